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

/// What each merge spells, the count of its pair, the corpus after all merges.
type Learnt = (Vec<Py<PyBytes>>, Vec<u64>, Vec<Vec<u32>>);

/// Learn up to `num_merges` merges from `records` (bytes each): what each merge spells, how often its pair stood in the
/// corpus, and the corpus after all merges. Runs without the interpreter's lock; Ctrl-C ends it with what there is.
///
/// Raises ValueError for a corpus of 2**32 - 1 symbols or more.
#[pyfunction]
fn train(
    py: Python<'_>,
    records: Vec<PyBackedBytes>,
    num_merges: usize,
    across_records: bool,
) -> PyResult<Learnt> {
    let interrupted = |done: usize| done % 16 == 0 && Python::attach(|py| py.check_signals().is_err());
    let trained = py
        .detach(|| crate::train::train(&records, num_merges, across_records, interrupted))
        .map_err(PyValueError::new_err)?;
    let spelled = trained.spelled.iter().map(|bytes| PyBytes::new(py, bytes).unbind()).collect();
    Ok((spelled, trained.counts, trained.ids))
}

#[pymodule]
fn _bpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Encoder>()?;
    module.add_function(wrap_pyfunction!(train, module)?)
}
