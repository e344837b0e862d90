"""Conversations as text and ids: turns, chat forms, what is supervised. Pure: strings and numbers."""
