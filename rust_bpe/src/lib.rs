//! The encoder of the ECG-Byte tokenizer; `trie` is the algorithm, `python` the module `elm_jax._bpe`.

pub mod trie;

#[cfg(feature = "python")]
mod python;
