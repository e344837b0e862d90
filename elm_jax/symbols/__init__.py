"""ECG-Byte: an ECG as symbols, the merges that are learnt of them, their files, reports and pictures."""
