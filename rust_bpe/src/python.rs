//! The Python module `elm_jax._bpe`. All work is done without the interpreter's lock.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use pyo3::buffer::{Element, PyBuffer};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyByteArray, PyBytes};

use crate::automaton::Automaton;
use crate::levels::{levels, Sample, Unusable};
use crate::pairs::{Merges, MOST};
use crate::train::Trained;

/// How often training asks for Ctrl-C and tells how far it is.
const TICK: Duration = Duration::from_millis(100);

/// The encoder of one tokenizer, built once and shared by threads: `merges` (bytes each; merge i has the id 256 + i) and
/// `symbols`, the byte that stands for each level of amplitude.
///
/// Raises ValueError for an empty merge and for symbols that are not 1 to 256 distinct ones.
#[pyclass(frozen)]
struct Encoder {
    spelled: Vec<PyBackedBytes>,
    symbols: Vec<u8>,
    automaton: Automaton,
    /// Made when it is first asked for.
    merges: OnceLock<Result<Merges, String>>,
}

#[pymethods]
impl Encoder {
    #[new]
    fn new(py: Python<'_>, merges: Vec<PyBackedBytes>, symbols: Vec<u8>) -> PyResult<Self> {
        if symbols.is_empty() {
            return Err(PyValueError::new_err("no symbols"));
        }
        let automaton = py.detach(|| Automaton::new(&merges, &symbols)).map_err(PyValueError::new_err)?;
        Ok(Encoder { spelled: merges, symbols, automaton, merges: OnceLock::new() })
    }

    /// The ids of `symbols` (bytes or bytearray) as a bytearray of 32-bit integers: the longest entry that matches at
    /// each place, or, if `in_order`, all merges in their order.
    ///
    /// Raises ValueError for more than 2**30 symbols, and for merges that have no order.
    fn encode<'py>(
        &self,
        py: Python<'py>,
        symbols: PyBackedBytes,
        in_order: bool,
    ) -> PyResult<Bound<'py, PyByteArray>> {
        let ids = py.detach(|| -> Result<Vec<u32>, String> {
            at_most(symbols.len())?;
            Ok(match self.order(in_order)? {
                Some(merges) => merges.encode(&symbols),
                None => self.automaton.encode(&self.automaton.codes(&symbols), |place| symbols[place]),
            })
        });
        as_integers(py, &[ids.map_err(PyValueError::new_err)?])
    }

    /// The ids of `records` recordings of equal size, one after the other in `samples` (a C-contiguous buffer of float32
    /// or float64, which is not copied), with up to `threads` threads: a bytearray of 32-bit integers, and how many of
    /// them each recording has. `eps` is added to the range of amplitudes of a recording.
    ///
    /// Raises TypeError for other buffers, ValueError for samples that have no levels and for merges without an order.
    fn encode_signals<'py>(
        &self,
        py: Python<'py>,
        samples: &Bound<'py, PyAny>,
        records: usize,
        eps: f64,
        in_order: bool,
        threads: usize,
    ) -> PyResult<(Bound<'py, PyByteArray>, Vec<usize>)> {
        let ids = on_samples(
            py,
            samples,
            |samples| self.ids_of(samples, records, eps, in_order, threads),
            |samples| self.ids_of(samples, records, eps, in_order, threads),
        )?;
        let ids = ids.map_err(PyValueError::new_err)?;
        Ok((as_integers(py, &ids)?, ids.iter().map(Vec::len).collect()))
    }

    /// The symbols of one recording. See `encode_signals`.
    fn symbols_of<'py>(
        &self,
        py: Python<'py>,
        samples: &Bound<'py, PyAny>,
        eps: f64,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let levels = on_samples(
            py,
            samples,
            |samples| self.levels_of(samples, eps),
            |samples| self.levels_of(samples, eps),
        )?;
        let levels = levels.map_err(PyValueError::new_err)?;
        let symbols: Vec<u8> = levels.iter().map(|&level| self.symbols[usize::from(level)]).collect();
        Ok(PyBytes::new(py, &symbols))
    }
}

impl Encoder {
    fn order(&self, wanted: bool) -> Result<Option<&Merges>, String> {
        if !wanted {
            return Ok(None);
        }
        let merges = self.merges.get_or_init(|| Merges::new(&self.spelled));
        merges.as_ref().map(Some).map_err(Clone::clone)
    }

    fn levels_of<S: Sample>(&self, samples: &[S], eps: f64) -> Result<Vec<u8>, String> {
        if !(eps >= 0.0 && eps.is_finite()) {
            return Err(format!("eps = {eps}"));
        }
        levels(samples, eps, self.symbols.len()).map_err(|unusable| match unusable {
            Unusable::Empty => "no samples".to_string(),
            Unusable::NotFinite(count) => format!("{count} samples that are not finite"),
            Unusable::TooWide => "samples too far apart for float64".to_string(),
        })
    }

    fn ids_of<S: Sample + Sync>(
        &self,
        samples: &[S],
        records: usize,
        eps: f64,
        in_order: bool,
        threads: usize,
    ) -> Result<Vec<Vec<u32>>, String> {
        let order = self.order(in_order)?;
        if records == 0 || samples.len() % records != 0 {
            return Err(format!("{} samples of {records} recordings", samples.len()));
        }
        let size = samples.len() / records;
        at_most(size)?;
        let encode = |record: usize| {
            let mut levels =
                self.levels_of(&samples[record * size..(record + 1) * size], eps).map_err(|error| {
                    if records > 1 {
                        format!("{error} in recording {record}")
                    } else {
                        error
                    }
                })?;
            let symbol = |level: u8| self.symbols[usize::from(level)];
            Ok(match order {
                // A level is the code of its symbol.
                None => self.automaton.encode(&levels, |place| symbol(levels[place])),
                Some(merges) => {
                    levels.iter_mut().for_each(|level| *level = symbol(*level));
                    merges.encode(&levels)
                }
            })
        };
        in_threads(records, threads, encode)
    }
}

fn at_most(symbols: usize) -> Result<(), String> {
    if symbols > MOST {
        return Err(format!("{symbols} symbols, more than the {MOST} that are encoded at once"));
    }
    Ok(())
}

/// `work` of 0..count in order, done by up to `threads` threads; of several errors the one of the lowest number.
fn in_threads<T: Send + Sync>(
    count: usize,
    threads: usize,
    work: impl Fn(usize) -> Result<T, String> + Sync,
) -> Result<Vec<T>, String> {
    if threads <= 1 || count <= 1 {
        return (0..count).map(work).collect();
    }
    let done: Vec<OnceLock<Result<T, String>>> = (0..count).map(|_| OnceLock::new()).collect();
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for _ in 0..threads.min(count) {
            scope.spawn(|| {
                while !failed.load(Ordering::Relaxed) {
                    let item = next.fetch_add(1, Ordering::Relaxed);
                    let Some(place) = done.get(item) else { break };
                    let result = work(item);
                    failed.fetch_or(result.is_err(), Ordering::Relaxed);
                    let _ = place.set(result);
                }
            });
        }
    });
    // Items are begun in order, so that all before the first error are there.
    done.into_iter().map_while(OnceLock::into_inner).collect()
}

/// The result of `single` or of `double` on the samples of a buffer, by their type.
fn on_samples<T: Send>(
    py: Python<'_>,
    samples: &Bound<'_, PyAny>,
    single: impl FnOnce(&[f32]) -> T + Send,
    double: impl FnOnce(&[f64]) -> T + Send,
) -> PyResult<T> {
    match PyBuffer::<f32>::get(samples) {
        Ok(buffer) => on_buffer(py, &buffer, single),
        Err(_) => on_buffer(py, &PyBuffer::<f64>::get(samples)?, double),
    }
}

fn on_buffer<S: Element + Sync, T: Send>(
    py: Python<'_>,
    buffer: &PyBuffer<S>,
    work: impl FnOnce(&[S]) -> T + Send,
) -> PyResult<T> {
    if !buffer.is_c_contiguous() {
        return Err(PyTypeError::new_err("samples that are not C-contiguous"));
    }
    if buffer.item_count() == 0 {
        return Ok(py.detach(|| work(&[])));
    }
    // SAFETY: the buffer is contiguous, aligned (PyBuffer checks it) and held until the end of this function. Who writes
    // into an array while it is encoded gets ids of what was there or is: levels are made once, and
    // stay in their bounds for any samples.
    let samples = unsafe { std::slice::from_raw_parts(buffer.buf_ptr().cast::<S>(), buffer.item_count()) };
    Ok(py.detach(|| work(samples)))
}

fn as_integers<'py>(py: Python<'py>, ids: &[Vec<u32>]) -> PyResult<Bound<'py, PyByteArray>> {
    let size = ids.iter().map(Vec::len).sum::<usize>() * 4;
    PyByteArray::new_with(py, size, |out| {
        for (four, id) in out.chunks_exact_mut(4).zip(ids.iter().flatten()) {
            four.copy_from_slice(&id.to_ne_bytes());
        }
        Ok(())
    })
}

/// What each merge spells, the count of its pair, symbols of the corpus before and after, and whether Ctrl-C ended it.
type Learnt = (Vec<Py<PyBytes>>, Vec<u64>, u64, u64, bool);

/// Learn up to `num_merges` merges from `records` (bytes each) with up to `threads` threads: see `Learnt`.
///
/// `progress(merges, count of the last pair, symbols left)` is called now and then. Ctrl-C (KeyboardInterrupt) ends
/// training with what there is; what else `progress` raises is raised.
/// Raises ValueError for a record, or with `across_records` a corpus, of some 2**32 symbols.
#[pyfunction]
fn train(
    py: Python<'_>,
    records: Vec<PyBackedBytes>,
    num_merges: usize,
    across_records: bool,
    threads: usize,
    progress: Option<Py<PyAny>>,
) -> PyResult<Learnt> {
    let raised = Mutex::new(None);
    let mut told = Instant::now();
    let stop = |so_far: &Trained| {
        if told.elapsed() < TICK {
            return false;
        }
        let result = Python::attach(|py| {
            py.check_signals()?;
            if let Some(progress) = &progress {
                let count = so_far.counts.last().copied().unwrap_or(0);
                progress.call1(py, (so_far.spelled.len(), count, so_far.tokens))?;
            }
            PyResult::Ok(())
        });
        told = Instant::now();
        result.map_err(|error| raised.lock().expect("one thread").replace(error)).is_err()
    };
    let trained = py.detach(|| crate::train::train(&records, num_merges, across_records, threads, stop));
    let trained = trained.map_err(PyValueError::new_err)?;
    let raised = raised.into_inner().expect("one thread");
    let interrupted = raised.is_some();
    if let Some(error) =
        raised.filter(|error| !error.is_instance_of::<pyo3::exceptions::PyKeyboardInterrupt>(py))
    {
        return Err(error);
    }
    let spelled = trained.spelled.iter().map(|bytes| PyBytes::new(py, bytes).unbind()).collect();
    Ok((spelled, trained.counts, trained.symbols, trained.tokens, interrupted))
}

#[pymodule]
fn _bpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Encoder>()?;
    module.add_function(wrap_pyfunction!(train, module)?)
}
