//! The columns of `events`, `layers`, `decisions`, `forecasts` and `staging`.

use arrow::array::RecordBatch;

use super::columns::{BatchBuilder, BatchReader};
use super::error::Result;
use super::rows_stats::Interner;
use super::table::{Table, TableRow};
use crate::seam::UnixNanos;
use crate::window::{DecisionRow, EventRow, ForecastRow, LayerRow, StagingRow};

impl TableRow for EventRow {
    const TABLE: Table = Table::Events;

    fn ts(&self) -> UnixNanos {
        self.ts
    }

    fn to_batch(rows: &[&Self]) -> Result<RecordBatch> {
        BatchBuilder::default()
            .micros("ts", rows.iter().map(|row| row.ts))
            .micros("received_at", rows.iter().map(|row| row.received))
            .opt_micros("expected_at", rows.iter().map(|row| row.expected))
            .text("id", rows.iter().map(|row| &*row.id))
            .text("source", rows.iter().map(|row| &*row.source))
            .text("type", rows.iter().map(|row| &*row.kind))
            .opt_text("subject", rows.iter().map(|row| row.subject.as_deref()))
            .names("volumes", rows.iter().map(|row| &*row.volumes))
            .opt_text(
                "datacontenttype",
                rows.iter().map(|row| row.data_content_type.as_deref()),
            )
            .opt_text("data", rows.iter().map(|row| row.data.as_deref()))
            .finish(Self::TABLE.name())
    }

    fn from_batch(batch: &RecordBatch) -> Result<Vec<Self>> {
        let reader = BatchReader::new(Self::TABLE, batch);
        let (ts, received) = (reader.times("ts")?, reader.times("received_at")?);
        let expected = reader.opt_times("expected_at")?;
        let (id, source) = (reader.text("id")?, reader.text("source")?);
        let (kind, subject) = (reader.text("type")?, reader.opt_text("subject")?);
        let content_type = reader.opt_text("datacontenttype")?;
        let data = reader.opt_text("data")?;
        (0..batch.num_rows())
            .map(|row| {
                Ok(Self {
                    ts: ts.ns(row),
                    received: received.ns(row),
                    expected: expected.ns(row),
                    id: id.value(row).to_owned(),
                    source: source.value(row).to_owned(),
                    kind: kind.value(row).to_owned(),
                    subject: subject.at(row).map(str::to_owned),
                    volumes: reader.names("volumes", row)?,
                    data_content_type: content_type.at(row).map(str::to_owned),
                    data: data.at(row).map(str::to_owned),
                })
            })
            .collect()
    }
}

impl TableRow for LayerRow {
    const TABLE: Table = Table::Layers;

    fn ts(&self) -> UnixNanos {
        self.ts
    }

    fn to_batch(rows: &[&Self]) -> Result<RecordBatch> {
        BatchBuilder::default()
            .micros("ts", rows.iter().map(|row| row.ts))
            .micros("started_at", rows.iter().map(|row| row.started))
            .text("group_name", rows.iter().map(|row| &*row.group))
            .text("volume", rows.iter().map(|row| &*row.volume))
            .text("layer", rows.iter().map(|row| &*row.layer))
            .count("sequence", rows.iter().map(|row| row.sequence))
            .text("kind", rows.iter().map(|row| &*row.kind))
            .text("level", rows.iter().map(|row| &*row.level))
            .text("method", rows.iter().map(|row| &*row.method))
            .text("generation", rows.iter().map(|row| &*row.generation))
            .count("epoch", rows.iter().map(|row| row.epoch))
            .count("pause_us", rows.iter().map(|row| row.pause_us))
            .count("changed_blocks", rows.iter().map(|row| row.changed_blocks))
            .count("bytes_read", rows.iter().map(|row| row.bytes_read))
            .count("bytes_stored", rows.iter().map(|row| row.bytes_stored))
            .opt_text("error", rows.iter().map(|row| row.error.as_deref()))
            .finish(Self::TABLE.name())
    }

    fn from_batch(batch: &RecordBatch) -> Result<Vec<Self>> {
        let reader = BatchReader::new(Self::TABLE, batch);
        let (ts, started) = (reader.times("ts")?, reader.times("started_at")?);
        let (group, volume) = (reader.text("group_name")?, reader.text("volume")?);
        let (layer, sequence) = (reader.text("layer")?, reader.counts("sequence")?);
        let (kind, level) = (reader.text("kind")?, reader.text("level")?);
        let (method, generation) = (reader.text("method")?, reader.text("generation")?);
        let (epoch, pause_us) = (reader.counts("epoch")?, reader.counts("pause_us")?);
        let changed_blocks = reader.counts("changed_blocks")?;
        let bytes_read = reader.counts("bytes_read")?;
        let bytes_stored = reader.counts("bytes_stored")?;
        let error = reader.opt_text("error")?;
        Ok((0..batch.num_rows())
            .map(|row| Self {
                ts: ts.ns(row),
                started: started.ns(row),
                group: group.value(row).into(),
                volume: volume.value(row).into(),
                layer: layer.value(row).to_owned(),
                sequence: sequence.at(row),
                kind: kind.value(row).to_owned(),
                level: level.value(row).to_owned(),
                method: method.value(row).to_owned(),
                generation: generation.value(row).to_owned(),
                epoch: epoch.at(row),
                pause_us: pause_us.at(row),
                changed_blocks: changed_blocks.at(row),
                bytes_read: bytes_read.at(row),
                bytes_stored: bytes_stored.at(row),
                error: error.at(row).map(str::to_owned),
            })
            .collect())
    }
}

impl TableRow for DecisionRow {
    const TABLE: Table = Table::Decisions;

    fn ts(&self) -> UnixNanos {
        self.ts
    }

    fn to_batch(rows: &[&Self]) -> Result<RecordBatch> {
        BatchBuilder::default()
            .micros("ts", rows.iter().map(|row| row.ts))
            .opt_text("group_name", rows.iter().map(|row| row.group.as_deref()))
            .text("volume", rows.iter().map(|row| &*row.volume))
            .text("action", rows.iter().map(|row| &*row.action))
            .opt_micros("window_start", rows.iter().map(|row| row.window_start))
            .opt_micros("window_end", rows.iter().map(|row| row.window_end))
            .text("reason", rows.iter().map(|row| &*row.reason))
            .finish(Self::TABLE.name())
    }

    fn from_batch(batch: &RecordBatch) -> Result<Vec<Self>> {
        let reader = BatchReader::new(Self::TABLE, batch);
        let (ts, group) = (reader.times("ts")?, reader.opt_text("group_name")?);
        let (volume, action) = (reader.text("volume")?, reader.text("action")?);
        let window_start = reader.opt_times("window_start")?;
        let window_end = reader.opt_times("window_end")?;
        let reason = reader.text("reason")?;
        let mut volumes = Interner::default();
        Ok((0..batch.num_rows())
            .map(|row| Self {
                ts: ts.ns(row),
                group: group.name(row),
                volume: volumes.name(volume.value(row)),
                action: action.value(row).to_owned(),
                window_start: window_start.ns(row),
                window_end: window_end.ns(row),
                reason: reason.value(row).to_owned(),
            })
            .collect())
    }
}

impl TableRow for ForecastRow {
    const TABLE: Table = Table::Forecasts;

    fn ts(&self) -> UnixNanos {
        self.issued
    }

    fn to_batch(rows: &[&Self]) -> Result<RecordBatch> {
        BatchBuilder::default()
            .micros("ts", rows.iter().map(|row| row.issued))
            .text("volume", rows.iter().map(|row| &*row.volume))
            .micros("target_start", rows.iter().map(|row| row.target_start))
            .micros("target_end", rows.iter().map(|row| row.target_end))
            .text("metric", rows.iter().map(|row| &*row.metric))
            .number("q10", rows.iter().map(|row| row.q10))
            .number("q50", rows.iter().map(|row| row.q50))
            .number("q80", rows.iter().map(|row| row.q80))
            .number("q90", rows.iter().map(|row| row.q90))
            .number("q95", rows.iter().map(|row| row.q95))
            .number("q99", rows.iter().map(|row| row.q99))
            .opt_number(
                "burst_probability",
                rows.iter().map(|row| row.burst_probability),
            )
            .text("member", rows.iter().map(|row| &*row.member))
            .finish(Self::TABLE.name())
    }

    fn from_batch(batch: &RecordBatch) -> Result<Vec<Self>> {
        let reader = BatchReader::new(Self::TABLE, batch);
        let (ts, volume) = (reader.times("ts")?, reader.text("volume")?);
        let target_start = reader.times("target_start")?;
        let target_end = reader.times("target_end")?;
        let (metric, member) = (reader.text("metric")?, reader.text("member")?);
        let (q10, q50) = (reader.numbers("q10")?, reader.numbers("q50")?);
        let (q80, q90) = (reader.numbers("q80")?, reader.numbers("q90")?);
        let (q95, q99) = (reader.numbers("q95")?, reader.numbers("q99")?);
        let burst_probability = reader.opt_numbers("burst_probability")?;
        let mut names: [Interner; 3] = Default::default();
        let [volumes, metrics, members] = &mut names;
        Ok((0..batch.num_rows())
            .map(|row| Self {
                issued: ts.ns(row),
                volume: volumes.name(volume.value(row)),
                target_start: target_start.ns(row),
                target_end: target_end.ns(row),
                metric: metrics.name(metric.value(row)),
                q10: q10.value(row),
                q50: q50.value(row),
                q80: q80.value(row),
                q90: q90.value(row),
                q95: q95.value(row),
                q99: q99.value(row),
                burst_probability: burst_probability.at(row),
                member: members.name(member.value(row)),
            })
            .collect())
    }
}

impl TableRow for StagingRow {
    const TABLE: Table = Table::Staging;

    fn ts(&self) -> UnixNanos {
        self.ts
    }

    fn to_batch(rows: &[&Self]) -> Result<RecordBatch> {
        BatchBuilder::default()
            .micros("ts", rows.iter().map(|row| row.ts))
            .text("volume", rows.iter().map(|row| &*row.volume))
            .text("action", rows.iter().map(|row| &*row.action))
            .count("offset", rows.iter().map(|row| row.offset))
            .count("length", rows.iter().map(|row| row.length))
            .opt_number("score", rows.iter().map(|row| row.score))
            .opt_micros("evicted_at", rows.iter().map(|row| row.evicted))
            .finish(Self::TABLE.name())
    }

    fn from_batch(batch: &RecordBatch) -> Result<Vec<Self>> {
        let reader = BatchReader::new(Self::TABLE, batch);
        let (ts, volume) = (reader.times("ts")?, reader.text("volume")?);
        let (offset, length) = (reader.counts("offset")?, reader.counts("length")?);
        let (action, score) = (reader.text("action")?, reader.opt_numbers("score")?);
        let evicted = reader.opt_times("evicted_at")?;
        let mut names: [Interner; 2] = Default::default();
        let [volumes, actions] = &mut names;
        Ok((0..batch.num_rows())
            .map(|row| Self {
                ts: ts.ns(row),
                volume: volumes.name(volume.value(row)),
                action: actions.name(action.value(row)),
                offset: offset.at(row),
                length: length.at(row),
                score: score.at(row),
                evicted: evicted.ns(row),
            })
            .collect())
    }
}
