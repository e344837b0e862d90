"""Retrieval: recordings of an index that are most like an ECG, and what is written of them. Specification: rag.md."""
