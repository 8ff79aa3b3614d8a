//! Blocks in queues: a slab of nodes linked into several queues, found by block. Pure.

use crate::stage::hash::BlockMap;

const NONE: u32 = u32::MAX;

/// A block in a queue.
#[derive(Clone, Copy, Debug)]
pub struct Node<T> {
    /// The block's index.
    pub block: u64,
    /// What is noted of it.
    pub value: T,
    queue: u8,
    newer: u32,
    older: u32,
}

#[derive(Clone, Copy, Debug)]
struct Ends {
    newest: u32,
    oldest: u32,
    len: usize,
}

/// `Q` queues of blocks; a block is in one of them at most.
#[derive(Clone, Debug)]
pub struct Queues<T, const Q: usize> {
    index: BlockMap<u32>,
    nodes: Vec<Node<T>>,
    free: Vec<u32>,
    ends: [Ends; Q],
}

impl<T: Copy, const Q: usize> Default for Queues<T, Q> {
    fn default() -> Self {
        Self {
            index: BlockMap::default(),
            nodes: Vec::new(),
            free: Vec::new(),
            ends: [Ends {
                newest: NONE,
                oldest: NONE,
                len: 0,
            }; Q],
        }
    }
}

impl<T: Copy, const Q: usize> Queues<T, Q> {
    /// Blocks in `queue`.
    pub fn len(&self, queue: usize) -> usize {
        self.ends[queue].len
    }

    /// The queue and the notes of `block`.
    pub fn get(&self, block: u64) -> Option<(usize, T)> {
        let node = &self.nodes[*self.index.get(&block)? as usize];
        Some((usize::from(node.queue), node.value))
    }

    /// The notes of `block`, to change.
    pub fn value_mut(&mut self, block: u64) -> Option<&mut T> {
        let at = *self.index.get(&block)?;
        Some(&mut self.nodes[at as usize].value)
    }

    /// The oldest block of `queue`.
    pub fn oldest(&self, queue: usize) -> Option<(u64, T)> {
        let node = self.nodes.get(self.ends[queue].oldest as usize)?;
        Some((node.block, node.value))
    }

    /// Puts `block` into `queue` as its newest, from wherever it was.
    pub fn push(&mut self, queue: usize, block: u64, value: T) {
        let at = match self.index.get(&block) {
            Some(at) => {
                let at = *at;
                self.unlink(at);
                at
            }
            None => {
                let node = Node {
                    block,
                    value,
                    queue: 0,
                    newer: NONE,
                    older: NONE,
                };
                let at = match self.free.pop() {
                    Some(at) => at,
                    None => {
                        self.nodes.push(node);
                        (self.nodes.len() - 1) as u32
                    }
                };
                self.nodes[at as usize] = node;
                self.index.insert(block, at);
                at
            }
        };
        let ends = &mut self.ends[queue];
        let node = &mut self.nodes[at as usize];
        node.value = value;
        node.queue = queue as u8;
        node.newer = NONE;
        node.older = ends.newest;
        match ends.newest {
            NONE => ends.oldest = at,
            newest => self.nodes[newest as usize].newer = at,
        }
        ends.newest = at;
        ends.len += 1;
    }

    /// Takes `block` out of its queue.
    pub fn remove(&mut self, block: u64) -> Option<(usize, T)> {
        let at = self.index.remove(&block)?;
        self.unlink(at);
        self.free.push(at);
        let node = &self.nodes[at as usize];
        Some((usize::from(node.queue), node.value))
    }

    /// Takes the oldest block out of `queue`.
    pub fn pop(&mut self, queue: usize) -> Option<(u64, T)> {
        let (block, value) = self.oldest(queue)?;
        self.remove(block);
        Some((block, value))
    }

    fn unlink(&mut self, at: u32) {
        let Node {
            queue,
            newer,
            older,
            ..
        } = self.nodes[at as usize];
        let ends = &mut self.ends[usize::from(queue)];
        ends.len -= 1;
        match newer {
            NONE => ends.newest = older,
            newer => self.nodes[newer as usize].older = older,
        }
        match older {
            NONE => self.ends[usize::from(queue)].oldest = newer,
            older => self.nodes[older as usize].newer = newer,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_leave_in_the_order_in_which_they_came() {
        let mut queues: Queues<u8, 2> = Queues::default();
        for block in 0..5 {
            queues.push(0, block, 0);
        }
        queues.push(0, 1, 9);
        queues.push(1, 2, 7);
        assert_eq!(queues.remove(3), Some((0, 0)));
        assert_eq!(queues.remove(3), None);
        queues.push(0, 8, 1);
        let mut left = Vec::new();
        while let Some((block, _)) = queues.pop(0) {
            left.push(block);
        }
        assert_eq!(left, [0, 4, 1, 8]);
        assert_eq!((queues.len(0), queues.len(1)), (0, 1));
        assert_eq!(queues.get(2), Some((1, 7)));
        assert!(queues.nodes.len() <= 6, "nodes are used again");
    }
}
