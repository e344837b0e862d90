//! The ECG-Byte tokenizer: `levels` turns amplitudes into symbols, `automaton` and `pairs` turn symbols into ids,
//! `train` learns merges; `python` is the module `elm_jax._bpe`.

pub mod automaton;
pub mod levels;
pub mod pairs;
pub mod train;

#[cfg(feature = "python")]
mod python;
