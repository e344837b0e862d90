//! Greedy longest match over a trie of all 256 bytes and all merges.

/// Marks a missing child and a node where no entry ends.
const NONE: u32 = u32::MAX;

const ROOT: u32 = 0;

/// The trie as one dense table: a row per node, a column per byte that occurs in a merge.
///
/// ECG symbols use 26 of the 256 bytes, so a table over the bytes in use is a tenth of one over all of them.
/// A byte outside the merges is its own id and needs no node.
pub struct Trie {
    /// Column of each byte, `NONE` when no merge has it.
    columns: [u32; 256],
    width: usize,
    /// `children[node * width + column]` is the next node or `NONE`.
    children: Vec<u32>,
    /// Id of the entry that ends at each node or `NONE`.
    ids: Vec<u32>,
}

impl Trie {
    /// Builds the trie of the bytes 0..=255 and of `merges`; of two that spell the same, the later wins.
    ///
    /// Fails when a merge is empty or an id is `u32::MAX`, which marks an empty place here.
    pub fn new<B: AsRef<[u8]>>(merges: &[(B, u32)]) -> Result<Self, String> {
        let mut columns = [NONE; 256];
        let mut width = 0;
        for &byte in merges.iter().flat_map(|(bytes, _)| bytes.as_ref()) {
            let column = &mut columns[usize::from(byte)];
            if *column == NONE {
                *column = width;
                width += 1;
            }
        }
        let mut trie = Trie { columns, width: width as usize, children: Vec::new(), ids: Vec::new() };
        trie.add_node();
        for byte in 0..=255u8 {
            if trie.columns[usize::from(byte)] != NONE {
                trie.insert(&[byte], u32::from(byte));
            }
        }
        for (bytes, id) in merges {
            if bytes.as_ref().is_empty() {
                return Err(format!("the merge with id {id} is empty"));
            }
            if *id == NONE {
                return Err(format!("{id} is not a valid id"));
            }
            trie.insert(bytes.as_ref(), *id);
        }
        Ok(trie)
    }

    /// The ids of `text`: at each place the longest entry that matches, from left to right.
    pub fn encode(&self, text: &[u8]) -> Vec<u32> {
        let mut out = Vec::with_capacity(text.len() / 4 + 1);
        let mut start = 0;
        while start < text.len() {
            let (id, length) = self.longest(&text[start..]);
            out.push(id);
            start += length;
        }
        out
    }

    /// The longest entry that starts `text` (not empty): its id and its length in bytes.
    fn longest(&self, text: &[u8]) -> (u32, usize) {
        let mut best = (u32::from(text[0]), 1);
        let mut node = ROOT;
        for (i, &byte) in text.iter().enumerate() {
            node = self.child(node, byte);
            if node == NONE {
                break;
            }
            let id = self.ids[node as usize];
            if id != NONE {
                best = (id, i + 1);
            }
        }
        best
    }

    fn child(&self, node: u32, byte: u8) -> u32 {
        match self.columns[usize::from(byte)] {
            NONE => NONE,
            column => self.children[node as usize * self.width + column as usize],
        }
    }

    fn insert(&mut self, bytes: &[u8], id: u32) {
        let mut node = ROOT;
        for &byte in bytes {
            let next = self.child(node, byte);
            node = if next == NONE { self.add_child(node, byte) } else { next };
        }
        self.ids[node as usize] = id;
    }

    fn add_child(&mut self, node: u32, byte: u8) -> u32 {
        let new = self.add_node();
        self.children[node as usize * self.width + self.columns[usize::from(byte)] as usize] = new;
        new
    }

    fn add_node(&mut self) -> u32 {
        let new = u32::try_from(self.ids.len()).expect("a trie of less than 2^32 nodes");
        self.children.resize(self.children.len() + self.width, NONE);
        self.ids.push(NONE);
        new
    }
}

#[cfg(test)]
mod tests {
    use super::Trie;

    fn encode(merges: &[(&str, u32)], text: &str) -> Vec<u32> {
        Trie::new(merges).unwrap().encode(text.as_bytes())
    }

    #[test]
    fn without_merges_every_byte_is_its_own_id() {
        let all: Vec<u8> = (0..=255).collect();
        let none: &[(&str, u32)] = &[];
        assert_eq!(Trie::new(none).unwrap().encode(&all), (0..=255).collect::<Vec<u32>>());
        assert!(encode(&[], "").is_empty());
    }

    #[test]
    fn the_longest_entry_wins_at_each_place() {
        let merges = [("ab", 256), ("abc", 257), ("bcd", 258)];
        assert_eq!(encode(&merges, "abcd"), [257, 100]);
        assert_eq!(encode(&merges, "abbcd"), [256, 258]);
    }

    #[test]
    fn a_walk_that_ends_inside_a_longer_entry_falls_back_to_the_last_whole_one() {
        assert_eq!(encode(&[("ab", 256), ("abcde", 257)], "abcdx"), [256, 99, 100, 120]);
        assert_eq!(encode(&[("abcde", 256)], "abcd"), [97, 98, 99, 100]);
    }

    #[test]
    fn of_two_merges_that_spell_the_same_the_later_id_wins() {
        assert_eq!(encode(&[("ab", 256), ("ab", 300)], "abab"), [300, 300]);
    }

    #[test]
    fn a_merge_of_one_byte_replaces_that_byte() {
        assert_eq!(encode(&[("a", 256)], "ab"), [256, 98]);
    }

    #[test]
    fn bytes_outside_the_merges_end_a_match() {
        assert_eq!(encode(&[("aa", 256)], "aa\u{e9}aaa"), [256, 195, 169, 256, 97]);
    }

    #[test]
    fn an_empty_merge_and_an_unusable_id_are_refused() {
        assert!(Trie::new(&[("", 256)]).is_err());
        assert!(Trie::new(&[("ab", u32::MAX)]).is_err());
    }
}
