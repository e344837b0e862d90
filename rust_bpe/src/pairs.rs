//! Merges in their order: what each is made of, and encoding as training would have merged.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// Two ids that stand side by side.
pub type Pair = (u32, u32);
pub type PairMap<V> = HashMap<Pair, V, BuildHasherDefault<PairHasher>>;

/// The ids below are single bytes.
pub const BYTES: u32 = 256;

/// Most symbols that are encoded at once: places, up to three for each symbol, are numbered by 32 bits.
pub const MOST: usize = 1 << 30;

/// Stands at a place whose symbol was merged into the one before.
const GONE: u32 = u32::MAX;

/// The pair that each merge replaces: merge i makes id 256 + i.
pub struct Merges {
    pairs: Vec<Pair>,
    ranks: PairMap<u32>,
}

impl Merges {
    /// The pairs of merges of which only the spelling is known.
    ///
    /// A merge's bytes, put together by the merges before it, are the two symbols that it was made of: where they stood
    /// in the corpus no earlier merge had reached across their edges, so that these made no difference. Fails, naming
    /// the merge, for spellings that no training can have given.
    pub fn new<B: AsRef<[u8]>>(spelled: &[B]) -> Result<Self, String> {
        let mut merges = Merges { pairs: Vec::with_capacity(spelled.len()), ranks: PairMap::default() };
        for (i, spelled) in spelled.iter().map(AsRef::as_ref).enumerate() {
            if spelled.len() > MOST {
                return Err(format!("merge {i} spells {} bytes", spelled.len()));
            }
            let &[first, second] = merges.encode(spelled).as_slice() else {
                return Err(format!("merge {i} is not two of the entries before it joined"));
            };
            merges.ranks.insert((first, second), i as u32);
            merges.pairs.push((first, second));
        }
        Ok(merges)
    }

    /// The ids of `text` after all merges, one after the other, each from left to right. Panics for more than `MOST`.
    pub fn encode(&self, text: &[u8]) -> Vec<u32> {
        assert!(text.len() <= MOST);
        let mut token: Vec<u32> = text.iter().map(|&byte| u32::from(byte)).collect();
        // Of each place the next one, and the one before; a place beyond either end is `end`.
        let end = text.len();
        let mut next: Vec<u32> = (1..=end as u32).collect();
        let mut previous: Vec<u32> = std::iter::once(end as u32).chain(0..end as u32).take(end).collect();
        let mut waiting = Waiting::new(self.pairs.len());
        let rank = |first: u32, second: u32| self.ranks.get(&(first, second)).copied();
        for (place, pair) in token.windows(2).enumerate() {
            waiting.extend(rank(pair[0], pair[1]), place as u32);
        }
        let mut places = Vec::new();
        for (merge, pair) in self.pairs.iter().enumerate() {
            // What a merge makes is part of later merges only, so that nothing is added to these any more.
            waiting.take(merge, &mut places);
            for &left in &places {
                let right = next[left as usize];
                if token[left as usize] != pair.0 || right as usize == end || token[right as usize] != pair.1
                {
                    continue; // another merge, or this one a place before, has taken one of the two
                }
                let id = BYTES + merge as u32;
                let (before, after) = (previous[left as usize], next[right as usize]);
                token[left as usize] = id;
                token[right as usize] = GONE;
                next[left as usize] = after;
                if (before as usize) < end {
                    waiting.extend(rank(token[before as usize], id), before);
                }
                if (after as usize) < end {
                    previous[after as usize] = left;
                    waiting.extend(rank(id, token[after as usize]), left);
                }
            }
        }
        token.retain(|&id| id != GONE);
        token
    }
}

/// Places where a merge may be made, by the merge: lists in one array.
struct Waiting {
    first: Vec<u32>,
    /// A place, and where the list goes on.
    entries: Vec<(u32, u32)>,
}

impl Waiting {
    fn new(merges: usize) -> Self {
        Waiting { first: vec![GONE; merges], entries: Vec::new() }
    }

    fn extend(&mut self, merge: Option<u32>, place: u32) {
        if let Some(merge) = merge {
            let rest = std::mem::replace(&mut self.first[merge as usize], self.entries.len() as u32);
            self.entries.push((place, rest));
        }
    }

    /// The places of a merge, from left to right.
    fn take(&self, merge: usize, places: &mut Vec<u32>) {
        places.clear();
        let mut at = self.first[merge];
        while let Some(&(place, rest)) = self.entries.get(at as usize) {
            places.push(place);
            at = rest;
        }
        places.sort_unstable();
    }
}

/// Multiplies and folds: pairs of small numbers need no more.
#[derive(Default)]
pub struct PairHasher(u64);

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

    #[test]
    fn merges_are_applied_in_their_order_and_not_by_length() {
        // "ab" is merged before "bc" can be: longest match would take "abc" no more than this does "bc".
        let merges = Merges::new(&["ab", "bc", "bcd"]).unwrap();
        assert_eq!(merges.encode(b"abcd"), [256, 99, 100]);
        assert_eq!(merges.encode(b"xbcd"), [120, 258]);
    }

    #[test]
    fn equal_pairs_are_merged_from_the_left() {
        assert_eq!(Merges::new(&["aa"]).unwrap().encode(b"aaaaa"), [256, 256, 97]);
    }

    #[test]
    fn nothing_and_one_byte_stay() {
        let merges = Merges::new(&["ab"]).unwrap();
        assert!(merges.encode(b"").is_empty());
        assert_eq!(merges.encode(b"\xff"), [255]);
    }

    #[test]
    fn spellings_that_no_training_gives_are_refused_by_number() {
        for spelled in [vec![""], vec!["a"], vec!["abc"], vec!["ab", "ab"]] {
            let last = spelled.len() - 1;
            assert!(
                Merges::new(&spelled).is_err_and(|error| error.contains(&format!("merge {last} "))),
                "{spelled:?}"
            );
        }
    }
}
