//! Greedy longest match over all bytes and the merges of a tokenizer: at each place the longest entry that matches.
//!
//! The entries form a trie, kept as a double array: the child of a node by a code lies at `base ^ code` and bears the
//! code as its label, so that a step is one load of four bytes. ECG-Byte's 23 000 nodes fill a hundred kilobytes. Nodes
//! are laid out depth first: chains without branches, most of the trie, are neighbours in memory.
//!
//! A long text is read at `STREAMS` places at once. Each place alone waits for memory at every step, together they do
//! not; and greedy matching from two places soon stops at the same one, whence what was read ahead is what follows.

/// An index of no node.
const NONE: usize = usize::MAX;
/// The label of an empty slot; codes are smaller.
const EMPTY: u32 = 256;
const LABEL_BITS: u32 = 9;
const LABEL: u32 = (1 << LABEL_BITS) - 1;
/// Slots are found by `base ^ code`, so blocks of 256 belong together.
const BLOCK: usize = 256;
const STREAMS: usize = 4;
/// Blocks, from the last one, in which a free place is looked for.
const SEARCHED: usize = 16;

pub struct Automaton {
    /// Bytes are read as codes: symbol i as i, what else is in the merges as the next ones, all others as the last.
    code_of: [u8; 256],
    root: usize,
    /// By slot: base of the node there, and its label in the low bits.
    slots: Vec<u32>,
    /// By slot: the longest entry on the way there, its id and its length.
    longest: Vec<(u32, u32)>,
    /// Length of each merge, and of the longest.
    lengths: Vec<usize>,
    reach: usize,
}

impl Automaton {
    /// The automaton of the bytes 0..=255 and of `merges`, merge i with the id 256 + i; of two that spell the same the
    /// later wins. Fails for an empty merge, for symbols that are not distinct, and for more nodes than 23 bits number.
    pub fn new<B: AsRef<[u8]>>(merges: &[B], symbols: &[u8]) -> Result<Self, String> {
        let mut known = symbols.to_vec();
        let mut is_known = [false; 256];
        for &symbol in symbols {
            if std::mem::replace(&mut is_known[usize::from(symbol)], true) {
                return Err(format!("the symbol {symbol} twice"));
            }
        }
        for &byte in merges.iter().flat_map(AsRef::as_ref) {
            if !std::mem::replace(&mut is_known[usize::from(byte)], true) {
                known.push(byte);
            }
        }
        // Where all bytes are known there is no other, and 255 is the code of one of them.
        let mut code_of = [known.len().min(255) as u8; 256];
        let mut trie = Trie::default();
        for (code, &byte) in known.iter().enumerate() {
            code_of[usize::from(byte)] = code as u8;
            trie.insert([code as u8], u32::from(byte));
        }
        for (i, merge) in merges.iter().map(AsRef::as_ref).enumerate() {
            if merge.is_empty() {
                return Err(format!("merge {i} is empty"));
            }
            trie.insert(merge.iter().map(|&byte| code_of[usize::from(byte)]), 256 + i as u32);
        }
        let lengths: Vec<usize> = merges.iter().map(|merge| merge.as_ref().len()).collect();
        let reach = lengths.iter().copied().max().unwrap_or(1);
        let (root, DoubleArray { slots, longest, .. }) = trie.into_double_array()?;
        Ok(Automaton { code_of, root, slots, longest, lengths, reach })
    }

    /// The code that each of `bytes` is read as.
    pub fn codes(&self, bytes: &[u8]) -> Vec<u8> {
        bytes.iter().map(|&byte| self.code_of[usize::from(byte)]).collect()
    }

    /// The ids of a text, given as the codes of its bytes. `byte(place)` is asked for bytes that no merge has.
    pub fn encode(&self, codes: &[u8], byte: impl Fn(usize) -> u8) -> Vec<u32> {
        // Up to here an entry that begins ends before the text does, and the step behind it too.
        let free = codes.len().saturating_sub(self.reach);
        let span = free / STREAMS;
        if span < 256 {
            let mut ids = Vec::with_capacity(codes.len() / 4 + 1);
            self.rest(codes, 0, codes.len(), &byte, &mut ids);
            return ids;
        }
        let mut streams: [Stream; STREAMS] =
            std::array::from_fn(|s| Stream { at: s * span, ids: Vec::with_capacity(span / 4) });
        self.advance(codes, &byte, &mut streams, span);
        for (s, stream) in streams.iter_mut().enumerate() {
            stream.at = self.rest(codes, stream.at, (s + 1) * span, &byte, &mut stream.ids);
        }
        let [first, ahead @ ..] = streams;
        let (mut at, mut ids) = (first.at, first.ids);
        for (s, stream) in ahead.into_iter().enumerate() {
            let (mut place, mut read) = ((s + 1) * span, stream.ids.iter());
            // `at` follows the text from the left, `place` the stream: until they meet.
            while at != place && at < stream.at {
                if place < at {
                    place += self.length_of(*read.next().expect("a stream that goes on to stream.at"));
                } else {
                    let (id, length) = self.step(codes, at, &byte);
                    ids.push(id);
                    at += length;
                }
            }
            if at == place {
                ids.extend_from_slice(read.as_slice());
                at = stream.at;
            }
        }
        self.rest(codes, at, codes.len(), &byte, &mut ids);
        ids
    }

    /// Moves all streams on in turn until one has read its `span`.
    fn advance(
        &self,
        codes: &[u8],
        byte: impl Fn(usize) -> u8,
        streams: &mut [Stream; STREAMS],
        span: usize,
    ) {
        let limit: [usize; STREAMS] = std::array::from_fn(|s| streams[s].at + span);
        let mut place: [usize; STREAMS] = std::array::from_fn(|s| streams[s].at);
        let mut base = [self.root; STREAMS];
        let mut node = [NONE; STREAMS];
        loop {
            for s in 0..STREAMS {
                let code = codes[place[s]];
                let next = base[s] ^ usize::from(code);
                let slot = self.slots[next];
                if slot & LABEL == u32::from(code) {
                    base[s] = (slot >> LABEL_BITS) as usize;
                    node[s] = next;
                    place[s] += 1;
                    continue;
                }
                let stream = &mut streams[s];
                let (id, length) = self.entry(node[s], || byte(stream.at));
                stream.ids.push(id);
                stream.at += length;
                if stream.at >= limit[s] {
                    return;
                }
                (place[s], base[s], node[s]) = (stream.at, self.root, NONE);
            }
        }
    }

    /// Reads on from `at` to the first end of an entry at or behind `end`, which is returned.
    fn rest(
        &self,
        codes: &[u8],
        mut at: usize,
        end: usize,
        byte: impl Fn(usize) -> u8,
        ids: &mut Vec<u32>,
    ) -> usize {
        while at < end {
            let (id, length) = self.step(codes, at, &byte);
            ids.push(id);
            at += length;
        }
        at
    }

    /// The longest entry that begins at `at`: its id and its length.
    fn step(&self, codes: &[u8], at: usize, byte: impl Fn(usize) -> u8) -> (u32, usize) {
        let (mut base, mut node) = (self.root, NONE);
        for &code in &codes[at..] {
            let next = base ^ usize::from(code);
            let slot = self.slots[next];
            if slot & LABEL != u32::from(code) {
                break;
            }
            base = (slot >> LABEL_BITS) as usize;
            node = next;
        }
        self.entry(node, || byte(at))
    }

    fn length_of(&self, id: u32) -> usize {
        id.checked_sub(256).map_or(1, |merge| self.lengths[merge as usize])
    }

    /// The longest entry on the way to a node; on none, the byte itself.
    fn entry(&self, node: usize, byte: impl Fn() -> u8) -> (u32, usize) {
        match self.longest.get(node) {
            Some(&(id, length)) => (id, length as usize),
            None => (u32::from(byte()), 1),
        }
    }
}

/// A place that is read from: the ids so far, and where the next begins.
struct Stream {
    at: usize,
    ids: Vec<u32>,
}

/// The trie while it is built: nodes in the order in which they came, the root first.
struct Trie {
    nodes: Vec<Node>,
}

struct Node {
    code: u8,
    id: Option<u32>,
    child: usize, // the first of them, or NONE
    sibling: usize,
}

impl Default for Trie {
    fn default() -> Self {
        Trie { nodes: vec![Node { code: 0, id: None, child: NONE, sibling: NONE }] }
    }
}

impl Trie {
    fn insert(&mut self, codes: impl IntoIterator<Item = u8>, id: u32) {
        let mut at = 0;
        for code in codes {
            let known = self.children(at).find(|&child| self.nodes[child].code == code);
            at = known.unwrap_or_else(|| {
                let new = self.nodes.len();
                let sibling = std::mem::replace(&mut self.nodes[at].child, new);
                self.nodes.push(Node { code, id: None, child: NONE, sibling });
                new
            });
        }
        self.nodes[at].id = Some(id);
    }

    fn children(&self, node: usize) -> impl Iterator<Item = usize> + '_ {
        let known = |at: usize| (at != NONE).then_some(at);
        std::iter::successors(known(self.nodes[node].child), move |&at| known(self.nodes[at].sibling))
    }

    /// The base of the root, and the array.
    fn into_double_array(self) -> Result<(usize, DoubleArray), String> {
        // The first block stays empty: the base of nodes without children.
        let mut array = DoubleArray::default();
        array.grow();
        array.lowest = BLOCK;
        let mut root = 0;
        // A node, its slot, its depth, the longest entry above it.
        let mut open = vec![(0, NONE, 0, (0, 0))];
        while let Some((node, slot, depth, longest)) = open.pop() {
            let codes: Vec<usize> =
                self.children(node).map(|child| usize::from(self.nodes[child].code)).collect();
            let base = if codes.is_empty() { 0 } else { array.base_for(&codes)? };
            if slot == NONE {
                root = base;
            } else {
                array.slots[slot] |= (base as u32) << LABEL_BITS;
            }
            for (child, code) in self.children(node).zip(codes) {
                let (at, depth) = (base ^ code, depth + 1);
                let longest = self.nodes[child].id.map_or(longest, |id| (id, depth));
                array.slots[at] = code as u32;
                array.longest[at] = longest;
                open.push((child, at, depth, longest));
            }
        }
        Ok((root, array))
    }
}

#[derive(Default)]
struct DoubleArray {
    slots: Vec<u32>,
    longest: Vec<(u32, u32)>,
    taken: Vec<bool>, // as a base: two nodes of one base would own each other's children
    lowest: usize,    // no slot below is free
}

impl DoubleArray {
    /// A base by which all of `codes`, one or more, fall on free slots.
    fn base_for(&mut self, codes: &[usize]) -> Result<usize, String> {
        while self.lowest < self.slots.len() && self.slots[self.lowest] & LABEL != EMPTY {
            self.lowest += 1;
        }
        // What is free further back is hard to fill: it is given up, lest each search pass all of it.
        let mut at = self.lowest.max(self.slots.len().saturating_sub(SEARCHED * BLOCK));
        loop {
            if at == self.slots.len() {
                self.grow();
            }
            let base = at ^ codes[0];
            if !self.taken[base] && codes.iter().all(|code| self.slots[base ^ code] == EMPTY) {
                if base >> (32 - LABEL_BITS) != 0 {
                    return Err(format!(
                        "merges of more than {} nodes are too many",
                        1u32 << (32 - LABEL_BITS)
                    ));
                }
                self.taken[base] = true;
                return Ok(base);
            }
            at += 1;
        }
    }

    fn grow(&mut self) {
        let length = self.slots.len() + BLOCK;
        self.slots.resize(length, EMPTY);
        self.longest.resize(length, (0, 0));
        self.taken.resize(length, false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn encode<B: AsRef<[u8]>>(merges: &[B], text: &[u8]) -> Vec<u32> {
        let automaton = Automaton::new(merges, b"").unwrap();
        automaton.encode(&automaton.codes(text), |place| text[place])
    }

    /// The same by the definition.
    fn by_definition(merges: &[Vec<u8>], text: &[u8]) -> Vec<u32> {
        let (mut ids, mut at) = (Vec::new(), 0);
        while at < text.len() {
            let fits = (0..merges.len()).filter(|&i| text[at..].starts_with(&merges[i]));
            let longest = fits.max_by_key(|&i| (merges[i].len(), i));
            ids.push(longest.map_or(u32::from(text[at]), |i| 256 + i as u32));
            at += longest.map_or(1, |i| merges[i].len());
        }
        ids
    }

    fn spelled(merges: &[Vec<u8>], ids: &[u32]) -> Vec<u8> {
        let spell =
            |&id: &u32| id.checked_sub(256).map_or(vec![id as u8], |merge| merges[merge as usize].clone());
        ids.iter().flat_map(spell).collect()
    }

    /// Merges and texts of few letters, so that they match; lengths beyond and below what is read in streams.
    fn letters(length: std::ops::Range<usize>) -> impl Strategy<Value = Vec<u8>> {
        prop::collection::vec(b'a'..b'd', length)
    }

    proptest! {
        #[test]
        fn ids_are_those_of_the_definition(
            merges in prop::collection::vec(letters(1..9), 0..20), text in letters(0..3000)
        ) {
            let ids = encode(&merges, &text);
            prop_assert_eq!(spelled(&merges, &ids), text.clone());
            prop_assert_eq!(ids, by_definition(&merges, &text));
        }

        #[test]
        fn streams_that_never_meet_change_nothing(period in 2usize..40, shift in 0usize..40, length in 1000usize..4000) {
            // One letter, one long merge: parses from two places stay apart by what their distance leaves over.
            let merges = vec![vec![b'a'; period], vec![b'a'; period + shift % 2]];
            let text = vec![b'a'; length];
            prop_assert_eq!(encode(&merges, &text), by_definition(&merges, &text));
        }

        #[test]
        fn any_bytes_are_given_back(
            merges in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..5), 0..300),
            text in prop::collection::vec(any::<u8>(), 0..2000)
        ) {
            let ids = encode(&merges, &text);
            prop_assert_eq!(spelled(&merges, &ids), text.clone());
            prop_assert_eq!(ids, by_definition(&merges, &text));
        }
    }

    #[test]
    fn all_bytes_may_be_in_the_merges() {
        let merges: Vec<Vec<u8>> = (0..=255u8).map(|byte| vec![byte, byte]).collect();
        let text: Vec<u8> = (0..=255u8).flat_map(|byte| [byte, byte, byte]).cycle().take(2000).collect();
        assert_eq!(encode(&merges, &text), by_definition(&merges, &text));
    }

    #[test]
    fn a_hundred_thousand_nodes_are_laid_out_in_no_time() {
        // Quadratic search would take minutes here.
        let mut state = 1u64;
        let mut letter = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            b'a' + ((state >> 33) % 26) as u8
        };
        let merges: Vec<Vec<u8>> = (0..12_000).map(|_| (0..12).map(|_| letter()).collect()).collect();
        let automaton = Automaton::new(&merges, b"").unwrap();
        assert!(automaton.slots.len() < 160_000, "{} slots", automaton.slots.len());
        let text = merges[..100].concat();
        assert_eq!(automaton.encode(&automaton.codes(&text), |_| 0), (256..356).collect::<Vec<u32>>());
    }

    #[test]
    fn without_merges_every_byte_is_its_own_id() {
        let all: Vec<u8> = (0..=255).collect();
        let none: &[&str] = &[];
        assert_eq!(encode(none, &all), (0..=255).collect::<Vec<u32>>());
        assert!(encode(none, b"").is_empty());
    }

    #[test]
    fn a_walk_that_ends_inside_a_longer_entry_falls_back_to_the_last_whole_one() {
        assert_eq!(encode(&["ab", "abcde"], b"abcdx"), [256, 99, 100, 120]);
        assert_eq!(encode(&["abcde"], b"abcd"), [97, 98, 99, 100]);
    }

    #[test]
    fn of_two_merges_that_spell_the_same_the_later_id_wins_and_a_merge_may_be_one_byte() {
        assert_eq!(encode(&["ab", "b", "ab"], b"abb"), [258, 257]);
    }

    #[test]
    fn the_codes_of_symbols_are_their_numbers() {
        let automaton = Automaton::new(&["xb"], b"zyx").unwrap();
        assert_eq!(automaton.codes(b"zyxba"), [0, 1, 2, 3, 4]);
        assert_eq!(automaton.encode(&[2, 3, 0], |_| unreachable!()), [256, 122]);
    }

    #[test]
    fn empty_merges_and_equal_symbols_are_refused() {
        assert!(Automaton::new(&["a", ""], b"").is_err_and(|error| error.contains("merge 1")));
        assert!(Automaton::new(&["a"], b"aba").is_err());
    }
}
