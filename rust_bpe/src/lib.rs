//! The ECG-Byte tokenizer: `trie` encodes, `train` learns merges, `python` is the module `elm_jax._bpe`.

pub mod train;
pub mod trie;

#[cfg(feature = "python")]
mod python;
