"""Recordings and what is made of them before any model: files, units, rates, leads, augmentation, paper."""
