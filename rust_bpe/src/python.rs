//! The Python module: one class that is built once per tokenizer and encodes without the interpreter's lock.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::PyBytes;

use crate::trie::Trie;

/// Greedy longest match over all bytes and `merges`, a list of (bytes, id).
///
/// Of two merges that spell the same, the later wins. Raises ValueError for an empty merge.
#[pyclass(frozen)]
struct Encoder {
    trie: Trie,
}

#[pymethods]
impl Encoder {
    #[new]
    fn new(merges: Vec<(PyBackedBytes, u32)>) -> PyResult<Self> {
        let trie = Trie::new(&merges).map_err(PyValueError::new_err)?;
        Ok(Encoder { trie })
    }

    /// The ids of `symbols` (bytes or bytearray), as bytes of little-endian 32-bit unsigned integers.
    fn encode<'py>(&self, py: Python<'py>, symbols: PyBackedBytes) -> PyResult<Bound<'py, PyBytes>> {
        let ids = py.detach(|| self.trie.encode(&symbols));
        PyBytes::new_with(py, 4 * ids.len(), |out| {
            for (four, id) in out.chunks_exact_mut(4).zip(ids) {
                four.copy_from_slice(&id.to_le_bytes());
            }
            Ok(())
        })
    }
}

#[pymodule]
fn _bpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Encoder>()
}
