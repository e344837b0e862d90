//! Byte-pair training, exact and deterministic: merge the commonest pair of neighbours, again and again.
//!
//! Neighbours are counted as windows, overlaps included ("aaaa" has "aa" three times); a merge replaces them from left
//! to right without overlaps. Of pairs that are equally common the smallest wins, first id first.
//!
//! Nothing is counted twice. A merge changes the counts of the pairs around the places where it happens, and no others,
//! and it alone makes the pairs that contain its new id. So the places of a pair are written down once, in ascending
//! order, when the pair comes into being; what has become stale since is passed over, and no list is ever sorted.
//!
//! Records are dealt to threads in shards, which keep the places. Counts are sums over shards: whatever the number of
//! threads, the merges are the same.
//!
//! Memory: 4 bytes for each symbol of the corpus, and 4 for each place that is written down: one for each symbol at
//! first, and at most two whenever two symbols become one; so up to 16 bytes for each symbol beside the symbols
//! themselves. On top of that about 150 bytes for each pair that was ever met: little in a corpus of many recordings,
//! which are alike, and more than all else in one of noise.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::mpsc::{channel, Receiver, Sender};

use crate::pairs::{Pair, PairMap, BYTES};

/// What training learnt: merge i has id 256 + i.
#[derive(Debug, Default, PartialEq)]
pub struct Trained {
    /// What each merge spells.
    pub spelled: Vec<Vec<u8>>,
    /// How often its pair stood in the corpus when it was chosen.
    pub counts: Vec<u64>,
    /// Symbols of the corpus before and after all merges.
    pub symbols: u64,
    pub tokens: u64,
}

/// Most symbols of a shard: places are numbered by 32 bits.
const SHARD: usize = u32::MAX as usize - 8;

/// Learn up to `num_merges` merges from `records` with up to `threads` threads; pairs reach across their edges only if
/// `across`, and then one thread works alone.
///
/// Fewer merges are learnt where no pair is left. `stop` sees what there is before each merge, and may end it so.
/// Fails for some 2^32 symbols in one record, or in all if `across`.
pub fn train<R: AsRef<[u8]> + Sync>(
    records: &[R],
    num_merges: usize,
    across: bool,
    threads: usize,
    mut stop: impl FnMut(&Trained) -> bool,
) -> Result<Trained, String> {
    let records: Vec<&[u8]> = records.iter().map(AsRef::as_ref).collect();
    let shards = if across { vec![&records[..]] } else { dealt(&records, threads) };
    let size = |shard: &[&[u8]]| shard.iter().map(|record| record.len() + 1).sum::<usize>();
    if let Some(most) = shards.iter().map(|shard| size(shard)).find(|&size| size > SHARD) {
        return Err(format!("{most} symbols that cannot be split are more than {SHARD}"));
    }
    let symbols = records.iter().map(|record| record.len() as u64).sum();
    let mut trained = Trained { symbols, tokens: symbols, ..Trained::default() };
    std::thread::scope(|scope| {
        let workers: Vec<Worker> =
            shards.iter().map(|records| Worker::start(scope, records, across)).collect();
        let mut corpus = Counts::default();
        workers.iter().for_each(|worker| corpus.add(worker.changes()));
        corpus.rank(None);
        while trained.spelled.len() < num_merges && !stop(&trained) {
            let Some((pair, count)) = corpus.commonest() else { break };
            let id = BYTES + trained.spelled.len() as u32;
            workers.iter().for_each(|worker| worker.merge(pair, id));
            for worker in &workers {
                let changes = worker.changes();
                trained.tokens -= changes.merged;
                corpus.add(changes);
            }
            corpus.rank(Some(pair));
            trained.spelled.push([pair.0, pair.1].map(|id| trained.spell(id)).concat());
            trained.counts.push(count);
        }
        Ok(trained)
    })
}

impl Trained {
    fn spell(&self, id: u32) -> Vec<u8> {
        id.checked_sub(BYTES).map_or_else(|| vec![id as u8], |merge| self.spelled[merge as usize].clone())
    }
}

/// `records` in about `parts` runs of about as many symbols each, none with more than a shard holds but for single records
/// that have more.
fn dealt<'a, 'b>(records: &'a [&'b [u8]], parts: usize) -> Vec<&'a [&'b [u8]]> {
    let total: usize = records.iter().map(|record| record.len() + 1).sum();
    let share = total.div_ceil(parts.max(1)).min(SHARD / 2);
    let (mut shards, mut begin, mut size) = (Vec::new(), 0, 0);
    for (i, record) in records.iter().enumerate() {
        if size > 0 && size + record.len() + 1 > SHARD {
            shards.push(&records[begin..i]);
            (begin, size) = (i, 0);
        }
        size += record.len() + 1;
        if size >= share {
            shards.push(&records[begin..=i]);
            (begin, size) = (i + 1, 0);
        }
    }
    if begin < records.len() {
        shards.push(&records[begin..]);
    }
    shards
}

/// The counts of all pairs, and which is the highest.
#[derive(Default)]
struct Counts {
    pairs: PairMap<i64>,
    /// Counts may be out of date: they are then too high, since a count only falls after the merge that made its pair.
    queue: BinaryHeap<(i64, Reverse<Pair>)>,
    made: Vec<Pair>,
}

impl Counts {
    fn add(&mut self, changes: Changes) {
        for (pair, change) in changes.pairs {
            *self.pairs.entry(pair).or_default() += change;
            if change > 0 {
                self.made.push(pair);
            }
        }
    }

    /// Take up the pairs that were made since; `merged` is gone for good.
    fn rank(&mut self, merged: Option<Pair>) {
        if let Some(pair) = merged {
            self.pairs.remove(&pair);
        }
        self.made.sort_unstable();
        self.made.dedup();
        for pair in self.made.drain(..) {
            if let Some(&count) = self.pairs.get(&pair) {
                self.queue.push((count, Reverse(pair)));
            }
        }
    }

    /// The pair with the highest count, and that; of several the smallest.
    fn commonest(&mut self) -> Option<(Pair, u64)> {
        while let Some((count, Reverse(pair))) = self.queue.pop() {
            let now = self.pairs.get(&pair).copied().unwrap_or(0);
            if now == 0 {
                self.pairs.remove(&pair);
            } else if now < count {
                self.queue.push((now, Reverse(pair)));
            } else {
                return Some((pair, count as u64));
            }
        }
        None
    }
}

/// What a merge changed in a shard.
#[derive(Default)]
struct Changes {
    pairs: Vec<(Pair, i64)>,
    merged: u64,
}

/// A thread with a shard.
struct Worker {
    merges: Sender<(Pair, u32)>,
    changes: Receiver<Changes>,
}

impl Worker {
    fn start<'scope, 'env>(
        scope: &'scope std::thread::Scope<'scope, 'env>,
        records: &'env [&'env [u8]],
        across: bool,
    ) -> Worker {
        let (merges, to_merge) = channel::<(Pair, u32)>();
        let (changed, changes) = channel();
        scope.spawn(move || {
            let (mut shard, mut news) = Shard::new(records, across);
            // Ends when the leader, done or failed, drops its ends of the channels.
            while changed.send(news).is_ok() {
                let Ok((pair, id)) = to_merge.recv() else { break };
                news = shard.merge(pair, id);
            }
        });
        Worker { merges, changes }
    }

    fn merge(&self, pair: Pair, id: u32) {
        self.merges.send((pair, id)).expect("a worker that waits for merges");
    }

    fn changes(&self) -> Changes {
        self.changes.recv().expect("a worker that answers")
    }
}

/// Stands between records, where nothing has a neighbour.
const EDGE: u32 = u32::MAX;
/// Stands inside a symbol that was merged.
const INSIDE: u32 = u32::MAX - 1;
/// Marks the last place of a symbol that has more than one.
const LAST: u32 = 1 << 31;

/// Records, each symbol at the place of its first byte; its last place bears its id too, marked, so that the symbol
/// before any place is known as well as the one behind.
struct Shard {
    token: Vec<u32>,
    /// In bytes, by id.
    length: Vec<u32>,
    /// Of the first of the two.
    places: PairMap<Vec<u32>>,
    before: Neighbours,
    after: Neighbours,
}

/// What stood beside the places of a merge: how often, by its id, and where the new pairs are.
struct Neighbours {
    places: Vec<Vec<u32>>,
    seen: Vec<u32>,
}

impl Neighbours {
    fn add(&mut self, id: u32, place: usize) {
        let places = &mut self.places[id as usize];
        if places.is_empty() {
            self.seen.push(id);
        }
        places.push(place as u32);
    }

    fn take(&mut self) -> Vec<(u32, Vec<u32>)> {
        let Neighbours { places, seen } = self;
        seen.drain(..).map(|id| (id, std::mem::take(&mut places[id as usize]))).collect()
    }
}

impl Shard {
    /// The shard of `records`, and how often each pair stands in it.
    fn new(records: &[&[u8]], across: bool) -> (Shard, Changes) {
        let size = records.iter().map(|record| record.len() + 1).sum::<usize>() + 1;
        let mut token = Vec::with_capacity(size);
        token.push(EDGE);
        for record in records {
            token.extend(record.iter().map(|&byte| u32::from(byte)));
            if !across {
                token.push(EDGE);
            }
        }
        if across {
            token.push(EDGE);
        }
        let pairs = || token.windows(2).enumerate().filter(|(_, pair)| pair[0] != EDGE && pair[1] != EDGE);
        let index = |pair: &[u32]| (pair[0] << 8 | pair[1]) as usize;
        let mut counts = vec![0u32; 1 << 16];
        pairs().for_each(|(_, pair)| counts[index(pair)] += 1);
        let mut places: Vec<Vec<u32>> =
            counts.iter().map(|&count| Vec::with_capacity(count as usize)).collect();
        pairs().for_each(|(place, pair)| places[index(pair)].push(place as u32));
        let pair_of = |index: usize| (index as u32 >> 8, index as u32 & 255);
        let stands = places.into_iter().enumerate().filter(|(_, places)| !places.is_empty());
        let places: PairMap<Vec<u32>> = stands.map(|(index, places)| (pair_of(index), places)).collect();
        let counted = places.iter().map(|(&pair, places)| (pair, places.len() as i64));
        let changes = Changes { pairs: counted.collect(), merged: 0 };
        let neighbours = || Neighbours { places: vec![Vec::new(); BYTES as usize], seen: Vec::new() };
        let length = vec![1; BYTES as usize];
        (Shard { token, length, places, before: neighbours(), after: neighbours() }, changes)
    }

    /// Replace the pair by `id` wherever it stands, from left to right.
    fn merge(&mut self, pair: Pair, id: u32) -> Changes {
        let (first, second) = (self.length[pair.0 as usize] as usize, self.length[pair.1 as usize] as usize);
        self.length.push((first + second) as u32);
        self.before.places.push(Vec::new());
        self.after.places.push(Vec::new());
        let mut merged = 0;
        for left in self.places.remove(&pair).unwrap_or_default() {
            let left = left as usize;
            let right = left + first;
            // Stale: another merge, or this one a place before, has taken one of the two.
            if self.token[left] != pair.0 || self.token[right] != pair.1 {
                continue;
            }
            let end = right + second;
            let (before, after) = (self.token[left - 1], self.token[end]);
            if before != EDGE {
                let before = before & !LAST;
                self.before.add(before, left - self.length[before as usize] as usize);
            }
            if after != EDGE {
                self.after.add(after, left);
            }
            self.token[right - 1] = INSIDE;
            self.token[right] = INSIDE;
            self.token[left] = id;
            self.token[end - 1] = id | LAST;
            merged += 1;
        }
        let mut changes = Changes { pairs: Vec::new(), merged };
        for (id_before, places) in self.before.take() {
            self.replace((id_before, pair.0), (id_before, id), places, &mut changes);
        }
        for (id_after, places) in self.after.take() {
            self.replace((pair.1, id_after), (id, id_after), places, &mut changes);
        }
        changes
    }

    /// At each of `places` the pair `made` now stands for `lost`.
    fn replace(&mut self, lost: Pair, made: Pair, mut places: Vec<u32>, changes: &mut Changes) {
        places.shrink_to_fit();
        changes.pairs.push((lost, -(places.len() as i64)));
        changes.pairs.push((made, places.len() as i64));
        self.places.insert(made, places);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pairs::Merges;
    use proptest::prelude::*;
    use std::collections::HashMap;

    /// The same by the definition: count all windows anew for every merge.
    fn by_definition(records: &[Vec<u8>], num_merges: usize) -> (Vec<Vec<u8>>, Vec<u64>, Vec<Vec<u32>>) {
        let mut ids: Vec<Vec<u32>> =
            records.iter().map(|r| r.iter().map(|&b| u32::from(b)).collect()).collect();
        let (mut spelled, mut chosen) = (Vec::<Vec<u8>>::new(), Vec::new());
        for id in (BYTES..).take(num_merges) {
            let mut counts: HashMap<Pair, u64> = HashMap::new();
            for pair in ids.iter().flat_map(|record| record.windows(2)) {
                *counts.entry((pair[0], pair[1])).or_default() += 1;
            }
            let Some((pair, count)) = counts.into_iter().max_by_key(|&(pair, count)| (count, Reverse(pair)))
            else {
                break;
            };
            for record in &mut ids {
                let mut left = 0;
                while left + 1 < record.len() {
                    if (record[left], record[left + 1]) == pair {
                        record.splice(left..left + 2, [id]);
                    }
                    left += 1;
                }
            }
            let spell =
                |id: u32| if id < BYTES { vec![id as u8] } else { spelled[(id - BYTES) as usize].clone() };
            spelled.push([spell(pair.0), spell(pair.1)].concat());
            chosen.push(count);
        }
        (spelled, chosen, ids)
    }

    fn corpus() -> impl Strategy<Value = Vec<Vec<u8>>> {
        (1u8..5).prop_flat_map(|letters| {
            prop::collection::vec(prop::collection::vec(b'a'..b'a' + letters, 0..60), 0..6)
        })
    }

    proptest! {
        #[test]
        fn training_and_encoding_are_those_of_the_definition(records in corpus(), merges in 0usize..40) {
            let (spelled, counts, ids) = by_definition(&records, merges);
            let found = train(&records, merges, false, 1, |_| false).unwrap();
            prop_assert_eq!(&found.spelled, &spelled);
            prop_assert_eq!(&found.counts, &counts);
            prop_assert_eq!(found.tokens as usize, ids.iter().map(Vec::len).sum::<usize>());
            let order = Merges::new(&found.spelled).unwrap();
            for (record, ids) in records.iter().zip(ids) {
                prop_assert_eq!(order.encode(record), ids);
            }
        }

        #[test]
        fn pairs_reach_across_records_when_asked(records in corpus(), merges in 0usize..40) {
            let (spelled, counts, ids) = by_definition(&[records.concat()], merges);
            let found = train(&records, merges, true, 3, |_| false).unwrap();
            prop_assert_eq!((found.spelled, found.counts), (spelled, counts));
            prop_assert_eq!(found.tokens as usize, ids.concat().len());
        }

        #[test]
        fn threads_change_nothing(records in corpus(), merges in 0usize..40, threads in 0usize..9) {
            let alone = train(&records, merges, false, 1, |_| false).unwrap();
            prop_assert_eq!(train(&records, merges, false, threads, |_| false).unwrap(), alone);
        }

        #[test]
        fn any_bytes_can_be_trained_on(records in prop::collection::vec(any::<Vec<u8>>(), 0..5), merges in 0usize..300) {
            let found = train(&records, merges, false, 2, |_| false).unwrap();
            let order = Merges::new(&found.spelled).unwrap();
            let tokens: usize = records.iter().map(|record| order.encode(record).len()).sum();
            prop_assert_eq!(found.tokens as usize, tokens);
        }
    }

    #[test]
    fn training_ends_where_no_pair_is_left_or_when_asked() {
        let learnt =
            |records: &[&str], across| train(records, 10, across, 1, |_| false).unwrap().spelled.len();
        assert_eq!(learnt(&["abc"], false), 2);
        assert_eq!(learnt(&["a", "b"], false), 0);
        assert_eq!(learnt(&["a", "b"], true), 1);
        assert_eq!(learnt(&[], false), 0);
        let mut seen = Vec::new();
        let found = train(&["abcabc"], 10, false, 1, |so_far| {
            seen.push(so_far.tokens);
            so_far.spelled.len() == 2
        });
        assert_eq!(found.unwrap().spelled, [b"ab".to_vec(), b"abc".to_vec()]);
        assert_eq!(seen, [6, 4, 2]);
    }

    #[test]
    fn of_equally_common_pairs_the_smallest_is_merged() {
        let found = train(&["dcba"], 2, false, 1, |_| false).unwrap();
        assert_eq!(found.spelled, [b"ba".to_vec(), b"cba".to_vec()]); // (c, 256) before (d, c)
    }
}
