//! Byte-pair training, exact and deterministic: merge the commonest pair of neighbours, again and again.
//!
//! Neighbours are counted as windows, overlaps included ("aaaa" has "aa" three times); a merge replaces them from left
//! to right without overlaps. Of pairs that are equally common the smallest wins, first id first. Nothing is counted
//! twice: a merge changes the counts of the pairs around the places where it happens, and no others. The places of a
//! pair are a list that only grows; what is stale in it is passed over.
//!
//! Memory: 12 bytes for each symbol of the corpus and 4 for each place that a pair was ever seen at, about as many again
//! as symbols at first; places of a merged pair are freed.

use std::collections::{BinaryHeap, HashMap};
use std::hash::{BuildHasherDefault, Hasher};

type Pair = (u32, u32);

const NONE: u32 = u32::MAX;
const BYTES: u32 = 256;

/// What training learnt: merge i has id 256 + i.
pub struct Trained {
    /// What each merge spells.
    pub spelled: Vec<Vec<u8>>,
    /// How often its pair stood in the corpus when it was chosen.
    pub counts: Vec<u64>,
    /// The corpus after all merges, record by record.
    pub ids: Vec<Vec<u32>>,
}

/// Learn up to `num_merges` merges from `records`; pairs reach across their edges only if `across`.
///
/// Fewer are learnt where no pair is left. `stop` is asked before each merge, and ends training with what there is.
pub fn train<R: AsRef<[u8]>>(
    records: &[R],
    num_merges: usize,
    across: bool,
    mut stop: impl FnMut(usize) -> bool,
) -> Result<Trained, String> {
    let mut corpus = Corpus::new(records, across)?;
    let mut spelled: Vec<Vec<u8>> = Vec::new();
    let mut counts = Vec::new();
    while spelled.len() < num_merges && !stop(spelled.len()) {
        let Some((pair, count)) = corpus.commonest() else { break };
        let spell = |id: u32| if id < BYTES { vec![id as u8] } else { spelled[(id - BYTES) as usize].clone() };
        let merged = [spell(pair.0), spell(pair.1)].concat();
        corpus.merge(pair, BYTES + spelled.len() as u32);
        spelled.push(merged);
        counts.push(count);
    }
    Ok(Trained { spelled, counts, ids: corpus.ids() })
}

/// The symbols as a doubly linked list over the places of the bytes, and the pairs in it.
struct Corpus {
    token: Vec<u32>, // NONE: swallowed by the symbol before
    next: Vec<u32>,
    previous: Vec<u32>,
    starts: Vec<(usize, usize)>, // places of each record
    pairs: HashMap<Pair, Places, BuildHasherDefault<PairHasher>>,
    queue: BinaryHeap<(u64, std::cmp::Reverse<Pair>)>, // counts may be out of date: then too high
}

#[derive(Default)]
struct Places {
    count: u64,
    left: Vec<u32>, // of the left symbol; some are stale
}

impl Corpus {
    fn new<R: AsRef<[u8]>>(records: &[R], across: bool) -> Result<Self, String> {
        let length: usize = records.iter().map(|record| record.as_ref().len()).sum();
        if length >= NONE as usize {
            return Err(format!("{length} symbols are more than the {} that can be trained on", NONE - 1));
        }
        let mut corpus = Corpus {
            token: Vec::with_capacity(length),
            next: Vec::with_capacity(length),
            previous: Vec::with_capacity(length),
            starts: Vec::with_capacity(records.len()),
            pairs: HashMap::default(),
            queue: BinaryHeap::new(),
        };
        for record in records {
            let begin = corpus.token.len();
            corpus.token.extend(record.as_ref().iter().map(|&byte| u32::from(byte)));
            corpus.starts.push((begin, corpus.token.len()));
        }
        let last = length.saturating_sub(1);
        corpus.next.extend((0..length).map(|i| if i == last { NONE } else { i as u32 + 1 }));
        corpus.previous.extend((0..length).map(|i| if i == 0 { NONE } else { i as u32 - 1 }));
        if !across {
            for &(begin, end) in corpus.starts.iter().filter(|(begin, end)| begin < end) {
                corpus.previous[begin] = NONE;
                corpus.next[end - 1] = NONE;
            }
        }
        for place in 0..length {
            if corpus.next[place] != NONE {
                let pair = (corpus.token[place], corpus.token[corpus.next[place] as usize]);
                corpus.pairs.entry(pair).or_default().add(place as u32);
            }
        }
        corpus.queue = corpus.pairs.iter().map(|(&pair, places)| (places.count, std::cmp::Reverse(pair))).collect();
        Ok(corpus)
    }

    /// The pair with the highest count, and that; of several the smallest.
    fn commonest(&mut self) -> Option<(Pair, u64)> {
        while let Some((count, std::cmp::Reverse(pair))) = self.queue.pop() {
            let now = self.pairs.get(&pair).map_or(0, |places| places.count);
            if now == count && now > 0 {
                return Some((pair, count));
            }
            if now > 0 && now < count {
                self.queue.push((now, std::cmp::Reverse(pair)));
            }
        }
        None
    }

    /// Replace the pair by `id` wherever it stands, from left to right.
    fn merge(&mut self, pair: Pair, id: u32) {
        let mut places = std::mem::take(&mut self.pairs.get_mut(&pair).expect("a pair that was counted").left);
        places.sort_unstable();
        places.dedup();
        let mut risen: Vec<Pair> = Vec::new();
        for place in places {
            let left = place as usize;
            let right = self.next[left];
            // Stale: another merge, or this one a place before, has taken one of the two.
            if self.token[left] != pair.0 || right == NONE || self.token[right as usize] != pair.1 {
                continue;
            }
            let (before, after) = (self.previous[left], self.next[right as usize]);
            self.pairs.get_mut(&pair).expect("the pair itself").count -= 1;
            if before != NONE {
                let neighbour = self.token[before as usize];
                self.lose((neighbour, pair.0));
                risen.push((neighbour, id));
                self.pairs.entry((neighbour, id)).or_default().add(before);
            }
            if after != NONE {
                let neighbour = self.token[after as usize];
                self.lose((pair.1, neighbour));
                risen.push((id, neighbour));
                self.pairs.entry((id, neighbour)).or_default().add(place);
                self.previous[after as usize] = place;
            }
            self.token[left] = id;
            self.token[right as usize] = NONE;
            self.next[left] = after;
        }
        debug_assert_eq!(self.pairs[&pair].count, 0);
        self.pairs.remove(&pair);
        risen.sort_unstable();
        risen.dedup();
        for pair in risen {
            let count = self.pairs.get(&pair).map_or(0, |places| places.count);
            if count > 0 {
                self.queue.push((count, std::cmp::Reverse(pair)));
            }
        }
    }

    fn lose(&mut self, pair: Pair) {
        self.pairs.get_mut(&pair).expect("a pair that was counted").count -= 1;
    }

    fn ids(&self) -> Vec<Vec<u32>> {
        let alive = |&(begin, end): &(usize, usize)| {
            self.token[begin..end].iter().copied().filter(|&token| token != NONE).collect()
        };
        self.starts.iter().map(alive).collect()
    }
}

impl Places {
    fn add(&mut self, place: u32) {
        self.count += 1;
        self.left.push(place);
    }
}

/// Multiplies and folds: pairs of small numbers need no more.
#[derive(Default)]
struct PairHasher(u64);

impl Hasher for PairHasher {
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u32(u32::from(byte));
        }
    }

    fn write_u32(&mut self, value: u32) {
        self.0 = (self.0.rotate_left(5) ^ u64::from(value)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn finish(&self) -> u64 {
        self.0 ^ (self.0 >> 32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same by the definition: count all windows anew for every merge.
    fn by_definition(records: &[&[u8]], num_merges: usize) -> (Vec<(Pair, u64)>, Vec<Vec<u32>>) {
        let mut ids: Vec<Vec<u32>> = records.iter().map(|r| r.iter().map(|&b| u32::from(b)).collect()).collect();
        let mut chosen = Vec::new();
        for merge in 0..num_merges {
            let mut counts: HashMap<Pair, u64> = HashMap::new();
            for pair in ids.iter().flat_map(|record| record.windows(2)) {
                *counts.entry((pair[0], pair[1])).or_default() += 1;
            }
            let Some((&pair, &count)) = counts.iter().max_by_key(|&(&pair, &count)| (count, std::cmp::Reverse(pair)))
            else {
                break;
            };
            for record in &mut ids {
                let mut out = Vec::new();
                let mut i = 0;
                while i < record.len() {
                    if i + 1 < record.len() && (record[i], record[i + 1]) == pair {
                        out.push(BYTES + merge as u32);
                        i += 2;
                    } else {
                        out.push(record[i]);
                        i += 1;
                    }
                }
                *record = out;
            }
            chosen.push((pair, count));
        }
        (chosen, ids)
    }

    fn noise(seed: u64, length: usize, letters: u64) -> Vec<u8> {
        let mut state = seed.wrapping_mul(2) + 1;
        (0..length)
            .map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                b'a' + ((state >> 33) % letters) as u8
            })
            .collect()
    }

    #[test]
    fn merges_counts_and_corpus_are_those_of_the_definition() {
        for seed in 0..40 {
            let records: Vec<Vec<u8>> = (0..3).map(|i| noise(10 * seed + i, 60, 1 + seed % 4)).collect();
            let views: Vec<&[u8]> = records.iter().map(Vec::as_slice).collect();
            let (chosen, ids) = by_definition(&views, 30);
            let found = train(&records, 30, false, |_| false).unwrap();
            assert_eq!(found.ids, ids);
            assert_eq!(found.counts, chosen.iter().map(|&(_, count)| count).collect::<Vec<_>>());
            let whole: Vec<u8> = records.concat();
            let (_, joined) = by_definition(&[&whole], 30);
            assert_eq!(train(&records, 30, true, |_| false).unwrap().ids.concat(), joined.concat());
        }
    }

    #[test]
    fn what_is_merged_spells_the_corpus() {
        let records = [noise(1, 500, 3), Vec::new(), noise(2, 1, 3)];
        let found = train(&records, 50, false, |_| false).unwrap();
        for (ids, record) in found.ids.iter().zip(&records) {
            let spelt: Vec<u8> = ids
                .iter()
                .flat_map(|&id| if id < BYTES { vec![id as u8] } else { found.spelled[(id - BYTES) as usize].clone() })
                .collect();
            assert_eq!(&spelt, record);
        }
    }

    #[test]
    fn training_ends_where_no_pair_is_left_or_when_asked() {
        assert_eq!(train(&["abc"], 10, false, |_| false).unwrap().spelled.len(), 2);
        assert_eq!(train(&["a", "b"], 10, false, |_| false).unwrap().spelled.len(), 0);
        assert_eq!(train(&["a", "b"], 10, true, |_| false).unwrap().spelled.len(), 1);
        let none: &[&str] = &[];
        assert!(train(none, 10, false, |_| false).unwrap().spelled.is_empty());
        assert_eq!(train(&["abcabc"], 10, false, |done| done == 1).unwrap().spelled.len(), 1);
    }
}
