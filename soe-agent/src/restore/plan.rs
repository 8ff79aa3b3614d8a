//! The order in which blocks are restored. Pure.

use std::collections::BTreeMap;

use crate::layer::{Extent, MergedIndex, RunSet};
use crate::seam::ByteRange;

/// One step: consecutive blocks of one layer, or of zeroes.
pub type Step = Extent;

/// The steps of one layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerSteps {
    /// The layer's place in the chain: 0 is the newest.
    pub layer: usize,
    /// Hot blocks in the order of their heat, then the others in the order of their addresses.
    pub steps: Vec<Step>,
}

/// A restore, newest layer first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The layers that still have something to say, newest first, the baseline last.
    pub layers: Vec<LayerSteps>,
}

impl Plan {
    /// All steps in their order.
    pub fn steps(&self) -> impl Iterator<Item = &Step> {
        self.layers.iter().flat_map(|layer| &layer.steps)
    }

    /// Number of blocks, zero ones included.
    pub fn block_count(&self) -> u64 {
        self.steps().map(|step| step.count).sum()
    }
}

/// Plans the restore of a whole image. `hot` names ranges of the volume, hottest first: inside each
/// layer their blocks come first, so that what the application works on is back first. With no hot
/// ranges each layer is in the order of addresses.
pub fn plan(index: &MergedIndex, hot: &[ByteRange]) -> Plan {
    let hot = hot_runs(index, hot);
    let mut layers: BTreeMap<usize, Vec<(usize, Step)>> = BTreeMap::new();
    for extent in index.extents() {
        let steps = layers.entry(extent.layer).or_default();
        steps.extend(split(extent, &hot));
    }
    let order = |(layer, mut steps): (usize, Vec<(usize, Step)>)| {
        steps.sort_by_key(|(rank, step)| (*rank, step.start));
        LayerSteps {
            layer,
            steps: steps.into_iter().map(|(_, step)| step).collect(),
        }
    };
    Plan {
        layers: layers.into_iter().map(order).collect(),
    }
}

/// Disjoint runs of blocks with their rank, ascending by block. A block in several ranges has the
/// rank of the hottest.
fn hot_runs(index: &MergedIndex, hot: &[ByteRange]) -> Vec<(u64, u64, usize)> {
    let block_size = u64::from(index.block_size());
    let mut taken = RunSet::default();
    let mut runs = Vec::new();
    // What lies behind the volume's end is in no block, although its last one may be cut short there.
    let inside = |range: &ByteRange| range.len > 0 && range.offset < index.volume_bytes();
    for (rank, range) in hot.iter().enumerate().filter(|(_, range)| inside(range)) {
        let first = range.offset / block_size;
        let end = range
            .offset
            .saturating_add(range.len)
            .div_ceil(block_size)
            .min(index.block_count());
        let mut from = first;
        // What a hotter range has taken is cut out.
        for run in taken
            .iter()
            .filter(|run| run.end > first && run.start < end)
        {
            if from < run.start {
                runs.push((from, run.start, rank));
            }
            from = from.max(run.end);
        }
        if from < end {
            runs.push((from, end, rank));
        }
        if first < end {
            taken.insert(first..end);
        }
    }
    runs.sort_unstable();
    runs
}

/// Cuts an extent at the borders of the hot runs and gives each part its rank.
fn split(extent: &Extent, hot: &[(u64, u64, usize)]) -> Vec<(usize, Step)> {
    const COLD: usize = usize::MAX;
    let mut parts = Vec::new();
    let mut from = extent.start;
    let first = hot.partition_point(|(_, end, _)| *end <= extent.start);
    for &(start, end, rank) in hot
        .iter()
        .skip(first)
        .take_while(|(start, ..)| *start < extent.end())
    {
        if from < start {
            parts.push((COLD, extent.cut(from, start)));
        }
        let (start, end) = (start.max(from), end.min(extent.end()));
        parts.push((rank, extent.cut(start, end)));
        from = end;
    }
    if from < extent.end() {
        parts.push((COLD, extent.cut(from, extent.end())));
    }
    parts
}
