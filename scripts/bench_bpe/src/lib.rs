//! The algorithm of the PyTorch framework's ECG tokenizer, written anew from its description, to measure against.
//!
//! Encoding builds a trie of nested hash maps out of all bytes and all merges for each recording, then takes the longest
//! entry that matches. Training counts all pairs of neighbours of the whole corpus, in parallel, for each merge. Ties
//! are broken as ours are (there: by chance), so that results can be compared.
//!
//! Called by ctypes: pointers are trusted.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::slice::{from_raw_parts, from_raw_parts_mut};

#[derive(Default)]
struct Node {
    children: HashMap<u8, Box<Node>>,
    id: Option<u32>,
}

impl Node {
    fn insert(&mut self, bytes: &[u8], id: u32) {
        let mut node = self;
        for &byte in bytes {
            node = node.children.entry(byte).or_default();
        }
        node.id = Some(id);
    }
}

pub struct Merges(Vec<(Vec<u8>, u32)>);

fn encode(text: &str, merges: &Merges) -> Vec<u32> {
    let mut root = Node::default();
    for byte in 0..=255u8 {
        root.insert(&[byte], u32::from(byte));
    }
    for (bytes, id) in &merges.0 {
        root.insert(bytes, *id);
    }
    let text = text.as_bytes();
    let (mut ids, mut at) = (Vec::new(), 0);
    while at < text.len() {
        let (mut node, mut best) = (&root, (0, 1));
        for (depth, byte) in text[at..].iter().enumerate() {
            let Some(next) = node.children.get(byte) else { break };
            node = next;
            if let Some(id) = node.id {
                best = (id, depth + 1);
            }
        }
        ids.push(best.0);
        at += best.1;
    }
    ids
}

fn symbols(samples: &[f32]) -> String {
    let low = samples.iter().copied().fold(f32::INFINITY, f32::min) as f64;
    let high = samples.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    let unit: Vec<f64> =
        samples.iter().map(|&x| ((x as f64 - low) / (high - low + 1e-6)).clamp(0.0, 1.0)).collect();
    let level: Vec<u8> = unit.iter().map(|x| ((x * 26.0).floor() as u8).min(25)).collect();
    level.iter().map(|&level| char::from(b'a' + level)).collect()
}

type Pair = (u32, u32);

fn count(ids: &[u32], threads: usize) -> HashMap<Pair, u64> {
    let of = |ids: &[u32]| {
        let mut counts = HashMap::new();
        for pair in ids.windows(2) {
            *counts.entry((pair[0], pair[1])).or_insert(0) += 1;
        }
        counts
    };
    let share = ids.len().div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        // A part reaches one id into the next, so that no window is lost.
        let parts: Vec<_> = (0..ids.len())
            .step_by(share)
            .map(|begin| scope.spawn(move || of(&ids[begin..(begin + share + 1).min(ids.len())])))
            .collect();
        let mut counts = HashMap::new();
        for part in parts {
            for (pair, n) in part.join().expect("a thread that counts") {
                *counts.entry(pair).or_insert(0) += n;
            }
        }
        counts
    })
}

fn merge(ids: &[u32], pair: Pair, id: u32) -> Vec<u32> {
    let (mut out, mut at) = (Vec::with_capacity(ids.len()), 0);
    while at < ids.len() {
        if at + 1 < ids.len() && (ids[at], ids[at + 1]) == pair {
            out.push(id);
            at += 2;
        } else {
            out.push(ids[at]);
            at += 1;
        }
    }
    out
}

/// # Safety
/// `bytes` has as many bytes as `lengths` (of `count` merges) sum up to.
#[no_mangle]
pub unsafe extern "C" fn bench_merges(bytes: *const u8, lengths: *const u32, count: usize) -> *mut Merges {
    let lengths = from_raw_parts(lengths, count);
    let mut rest = from_raw_parts(bytes, lengths.iter().map(|&length| length as usize).sum());
    let mut merges = Vec::with_capacity(count);
    for (id, &length) in (256..).zip(lengths) {
        let (one, behind) = rest.split_at(length as usize);
        merges.push((one.to_vec(), id));
        rest = behind;
    }
    Box::into_raw(Box::new(Merges(merges)))
}

/// # Safety
/// `merges` comes from `bench_merges`; `ids` has room for `count` of them, of which the number is returned.
#[no_mangle]
pub unsafe extern "C" fn bench_encode(
    merges: *const Merges,
    samples: *const f32,
    count: usize,
    ids: *mut u32,
) -> usize {
    let found = encode(&symbols(from_raw_parts(samples, count)), &*merges);
    from_raw_parts_mut(ids, found.len()).copy_from_slice(&found);
    found.len()
}

/// # Safety
/// `text` has `length` bytes; `pairs` has room for two ids of each merge, of which the number is returned.
#[no_mangle]
pub unsafe extern "C" fn bench_train(
    text: *const u8,
    length: usize,
    num_merges: usize,
    threads: usize,
    pairs: *mut u32,
) -> usize {
    let mut ids: Vec<u32> = from_raw_parts(text, length).iter().map(|&byte| u32::from(byte)).collect();
    let pairs = from_raw_parts_mut(pairs, 2 * num_merges);
    for done in 0..num_merges {
        let best = count(&ids, threads).into_iter().max_by_key(|&(pair, count)| (count, Reverse(pair)));
        let Some((pair, _)) = best else { return done };
        ids = merge(&ids, pair, 256 + done as u32);
        pairs[2 * done..2 * done + 2].copy_from_slice(&[pair.0, pair.1]);
    }
    num_merges
}
