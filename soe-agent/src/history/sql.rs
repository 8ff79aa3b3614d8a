//! SQL over the history, read-only and in bounded memory.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, SchemaRef};
use arrow::json::LineDelimitedWriter;
use arrow::util::display::{ArrayFormatter, FormatOptions};
use datafusion::common::DataFusionError;
use datafusion::datasource::file_format::parquet::ParquetFormat;
use datafusion::datasource::listing::{
    ListingOptions, ListingTable, ListingTableConfig, ListingTableUrl,
};
use datafusion::execution::context::SQLOptions;
use datafusion::execution::runtime_env::RuntimeEnvBuilder;
use datafusion::prelude::{SessionConfig, SessionContext};
use futures::StreamExt;
use rustix::fs::{FlockOperation, flock};

use super::error::{HistoryError, Result, one_line};
use super::partition::SUFFIX;
use super::read::HistoryReader;
use super::table::Table;

/// Rows by which the widths of a printed table are chosen; later cells may stick out.
const WIDTH_ROWS: usize = 1000;
/// How often a query is run again because a compaction took a file away before it was opened.
const RETRIES: usize = 5;

/// How results are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SqlFormat {
    /// Columns for eyes.
    Table,
    /// A JSON object a line; missing values are `null`, times are RFC 3339.
    JsonLines,
}

/// What a query may use.
#[derive(Clone, Copy, Debug)]
pub struct SqlLimits {
    /// Bytes of memory; sorts and joins that need more go to a temporary folder.
    pub memory_bytes: usize,
}

impl Default for SqlLimits {
    fn default() -> Self {
        Self {
            memory_bytes: 256 << 20,
        }
    }
}

/// Runs one query over the history in `dir` and writes its rows to `out`. Returns their number.
///
/// Every table is there, also when it has no rows yet, with the columns `dt` and `hour` of its
/// folders beside its own. Statements that would change anything are refused.
pub async fn run_sql(
    dir: &Path,
    query: &str,
    limits: SqlLimits,
    format: SqlFormat,
    out: &mut (dyn Write + Send),
) -> Result<u64> {
    let folder = File::open(dir).map_err(HistoryError::io("open history folder", dir))?;
    // While this is held the agent compacts nothing. It waits at most for one compaction.
    let _ = flock(&folder, FlockOperation::LockShared);
    let mut attempt = 0;
    loop {
        attempt += 1;
        let mut printer = Printer::new(format, out);
        match run(dir, query, limits, &mut printer).await {
            Ok(()) => return printer.finish(),
            Err(Failure::History(error)) => return Err(error),
            Err(Failure::Engine(error)) => {
                if printer.nothing_out() && attempt < RETRIES && is_not_found(&error) {
                    continue;
                }
                return Err(explain(dir, &error));
            }
        }
    }
}

enum Failure {
    History(HistoryError),
    Engine(DataFusionError),
}

impl From<HistoryError> for Failure {
    fn from(error: HistoryError) -> Self {
        Self::History(error)
    }
}

impl From<DataFusionError> for Failure {
    fn from(error: DataFusionError) -> Self {
        Self::Engine(error)
    }
}

async fn run(
    dir: &Path,
    query: &str,
    limits: SqlLimits,
    printer: &mut Printer<'_>,
) -> Result<(), Failure> {
    let context = context(limits)?;
    for table in Table::ALL {
        register(&context, dir, table)?;
    }
    let refused = |error: DataFusionError| HistoryError::Query {
        reason: sentence(&error),
    };
    let plan = context
        .state()
        .create_logical_plan(query)
        .await
        .map_err(refused)?;
    let read_only = SQLOptions::new()
        .with_allow_ddl(false)
        .with_allow_dml(false)
        .with_allow_statements(false);
    read_only
        .verify_plan(&plan)
        .map_err(|_| HistoryError::Query {
            reason: "the history is read-only; use SELECT, SHOW TABLES, DESCRIBE or EXPLAIN".into(),
        })?;
    let frame = context.execute_logical_plan(plan).await?;
    let schema = Arc::new(frame.schema().as_arrow().clone());
    let mut batches = frame.execute_stream().await?;
    while let Some(batch) = batches.next().await {
        printer.print(&batch?)?;
    }
    printer.end(&schema)?;
    Ok(())
}

fn context(limits: SqlLimits) -> Result<SessionContext, DataFusionError> {
    let runtime = RuntimeEnvBuilder::new()
        .with_memory_limit(limits.memory_bytes, 1.0)
        // What was listed for one query may be compacted before the next.
        .with_object_list_cache_limit(0)
        .build_arc()?;
    let mut config = SessionConfig::new().with_information_schema(true);
    config.options_mut().execution.time_zone = Some("UTC".to_owned());
    config.options_mut().execution.parquet.pushdown_filters = true;
    Ok(SessionContext::new_with_config_rt(config, runtime))
}

fn register(context: &SessionContext, dir: &Path, table: Table) -> Result<(), Failure> {
    let absolute =
        std::path::absolute(dir.join(table.name())).map_err(HistoryError::io("resolve", dir))?;
    // A trailing slash makes it a folder, which need not exist.
    let text = format!("{}/", absolute.display());
    let url = ListingTableUrl::parse(&text)?;
    let format = Arc::new(ParquetFormat::new());
    let options = ListingOptions::new(format)
        .with_file_extension(SUFFIX)
        .with_table_partition_cols(vec![
            ("dt".to_owned(), DataType::Date32),
            ("hour".to_owned(), DataType::Int32),
        ]);
    let config = ListingTableConfig::new(url)
        .with_listing_options(options)
        .with_schema(table.schema().map_err(Failure::from)?);
    context.register_table(table.name(), Arc::new(ListingTable::try_new(config)?))?;
    Ok(())
}

/// The engine's message as one sentence.
fn sentence(error: &DataFusionError) -> String {
    let message = error.strip_backtrace();
    let message = one_line(&message);
    let known = [
        "Error during planning: ",
        "SQL error: ",
        "Schema error: ",
        "This feature is not implemented: ",
    ];
    let stripped = known.iter().find_map(|prefix| message.strip_prefix(prefix));
    stripped.unwrap_or(&message).to_owned()
}

/// Names the damaged file, when there is one: the engine's own message rarely does.
fn explain(dir: &Path, error: &DataFusionError) -> HistoryError {
    let damaged = HistoryReader::open(dir)
        .and_then(|reader| reader.verify())
        .ok()
        .and_then(|errors| errors.into_iter().find(HistoryError::is_integrity));
    damaged.unwrap_or_else(|| match error.find_root() {
        DataFusionError::ResourcesExhausted(_) => HistoryError::QueryRun {
            reason: "it needs more memory than it may use; ask for fewer columns, a shorter range or LIMIT".into(),
        },
        other => HistoryError::QueryRun { reason: sentence(other) },
    })
}

fn is_not_found(error: &DataFusionError) -> bool {
    let text = error.to_string();
    text.contains("not found") || text.contains("No such file")
}

/// Writes batches as they come.
struct Printer<'a> {
    format: SqlFormat,
    out: &'a mut (dyn Write + Send),
    rows: u64,
    /// Rows of a table that wait until the widths are chosen.
    held: Vec<Vec<String>>,
    widths: Vec<usize>,
    numeric: Vec<bool>,
    header: Vec<String>,
    chosen: bool,
}

impl<'a> Printer<'a> {
    fn new(format: SqlFormat, out: &'a mut (dyn Write + Send)) -> Self {
        Self {
            format,
            out,
            rows: 0,
            held: Vec::new(),
            widths: Vec::new(),
            numeric: Vec::new(),
            header: Vec::new(),
            chosen: false,
        }
    }

    fn nothing_out(&self) -> bool {
        self.rows == 0
    }

    fn print(&mut self, batch: &RecordBatch) -> Result<()> {
        if batch.num_rows() == 0 {
            return Ok(());
        }
        match self.format {
            SqlFormat::JsonLines => self.print_json(batch)?,
            SqlFormat::Table => self.print_table(batch)?,
        }
        self.rows += batch.num_rows() as u64;
        Ok(())
    }

    fn print_json(&mut self, batch: &RecordBatch) -> Result<()> {
        let mut lines = Vec::new();
        let mut writer = arrow::json::WriterBuilder::new()
            .with_explicit_nulls(true)
            .build::<_, arrow::json::writer::LineDelimited>(&mut lines);
        writer
            .write(batch)
            .and_then(|()| writer.finish())
            .map_err(cell_error)?;
        drop::<LineDelimitedWriter<_>>(writer);
        self.out.write_all(&lines).map_err(write_error)
    }

    fn print_table(&mut self, batch: &RecordBatch) -> Result<()> {
        self.learn(&batch.schema());
        let options = FormatOptions::default()
            .with_timestamp_tz_format(Some("%Y-%m-%dT%H:%M:%S%.fZ"))
            .with_display_error(true);
        let cells = batch
            .columns()
            .iter()
            .map(|column| ArrayFormatter::try_new(column, &options))
            .collect::<std::result::Result<Vec<_>, _>>()
            .map_err(cell_error)?;
        for row in 0..batch.num_rows() {
            let line: Vec<String> = cells
                .iter()
                .map(|cell| cell.value(row).to_string())
                .collect();
            if self.chosen {
                self.line(&line)?;
                continue;
            }
            self.held.push(line);
            if self.held.len() >= WIDTH_ROWS {
                self.choose()?;
            }
        }
        Ok(())
    }

    fn learn(&mut self, schema: &SchemaRef) {
        if self.header.is_empty() {
            self.header = schema
                .fields()
                .iter()
                .map(|field| field.name().clone())
                .collect();
            self.numeric = schema
                .fields()
                .iter()
                .map(|field| field.data_type().is_numeric())
                .collect();
        }
    }

    /// Chooses the widths and writes what was held.
    fn choose(&mut self) -> Result<()> {
        self.chosen = true;
        let held = std::mem::take(&mut self.held);
        let header = std::mem::take(&mut self.header);
        self.widths = header.iter().map(|name| name.chars().count()).collect();
        for line in &held {
            for (width, cell) in self.widths.iter_mut().zip(line) {
                *width = (*width).max(cell.chars().count());
            }
        }
        self.line(&header)?;
        let rule: Vec<String> = self.widths.iter().map(|&width| "-".repeat(width)).collect();
        self.line(&rule)?;
        held.iter().try_for_each(|line| self.line(line))
    }

    fn line(&mut self, cells: &[String]) -> Result<()> {
        let mut text = String::new();
        for (at, (cell, &width)) in cells.iter().zip(&self.widths).enumerate() {
            if at > 0 {
                text.push_str("  ");
            }
            match self.numeric.get(at) {
                Some(true) => text.push_str(&format!("{cell:>width$}")),
                _ => text.push_str(&format!("{cell:<width$}")),
            }
        }
        writeln!(self.out, "{}", text.trim_end()).map_err(write_error)
    }

    fn end(&mut self, schema: &SchemaRef) -> Result<()> {
        if self.format == SqlFormat::Table && !self.chosen {
            self.learn(schema);
            self.choose()?;
        }
        self.out.flush().map_err(write_error)
    }

    fn finish(self) -> Result<u64> {
        Ok(self.rows)
    }
}

fn write_error(source: std::io::Error) -> HistoryError {
    HistoryError::Io {
        call: "write",
        path: "query output".into(),
        source,
    }
}

fn cell_error(error: arrow::error::ArrowError) -> HistoryError {
    HistoryError::QueryRun {
        reason: one_line(&error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::tests::window;
    use crate::history::{HistoryStore, StoreConfig, partition};
    use crate::window::SECOND_NS;

    const T0: i64 = 1_767_225_600 * SECOND_NS;

    fn history() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let store = HistoryStore::open(StoreConfig::new(dir.path())).unwrap();
        for hour in 0..3 {
            let rows: Vec<_> = (0..50)
                .map(|i| {
                    window(
                        T0 + (hour * 3600 + i) * SECOND_NS,
                        if i % 2 == 0 { "a" } else { "b" },
                        5,
                    )
                })
                .collect();
            store.append(&rows).unwrap();
        }
        store.close().unwrap();
        dir
    }

    fn ask_as(dir: &Path, query: &str, format: SqlFormat) -> Result<String> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let mut out = Vec::new();
        runtime.block_on(run_sql(dir, query, SqlLimits::default(), format, &mut out))?;
        Ok(String::from_utf8(out).unwrap())
    }

    fn ask(dir: &Path, query: &str) -> Result<Vec<serde_json::Value>> {
        let lines = ask_as(dir, query, SqlFormat::JsonLines)?;
        Ok(lines
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect())
    }

    #[test]
    fn sums_are_those_of_the_rows() {
        let dir = history();
        let rows = ask(
            dir.path(),
            "SELECT volume, hour, CAST(dt AS VARCHAR) AS dt, sum(read_ops) AS ops, count(*) AS n \
             FROM volume_stats WHERE ts < TIMESTAMP '2026-01-01T02:00:00Z' AND hour = 1 \
             GROUP BY volume, hour, dt ORDER BY volume",
        )
        .unwrap();
        assert_eq!(
            rows,
            [
                serde_json::json!({"volume": "a", "hour": 1, "dt": "2026-01-01", "ops": 125, "n": 25}),
                serde_json::json!({"volume": "b", "hour": 1, "dt": "2026-01-01", "ops": 125, "n": 25}),
            ]
        );
    }

    #[test]
    fn missing_values_are_null_and_times_are_utc() {
        let dir = history();
        let query =
            "SELECT ts, write_bytes, read_latency_histogram FROM volume_stats ORDER BY ts LIMIT 1";
        let row = ask(dir.path(), query).unwrap().remove(0);
        assert_eq!(row["ts"], "2026-01-01T00:00:00Z");
        assert_eq!(row["write_bytes"], serde_json::Value::Null);
        assert_eq!(
            row["read_latency_histogram"][0],
            serde_json::json!({"from_ns": 960, "count": 1})
        );
    }

    #[test]
    fn tables_without_rows_are_there() {
        let dir = tempfile::tempdir().unwrap();
        for table in Table::ALL {
            let rows = ask(dir.path(), &format!("SELECT count(*) AS n FROM {table}")).unwrap();
            assert_eq!(rows, [serde_json::json!({"n": 0})]);
        }
        let text = ask_as(dir.path(), "SELECT ts, id FROM events", SqlFormat::Table).unwrap();
        assert_eq!(text, "ts  id\n--  --\n");
        assert_eq!(
            ask(dir.path(), "SHOW TABLES").unwrap().len() >= Table::ALL.len(),
            true
        );
    }

    #[test]
    fn a_table_for_eyes() {
        let dir = history();
        let query =
            "SELECT volume, count(*) AS n FROM volume_stats GROUP BY volume ORDER BY volume";
        let text = ask_as(dir.path(), query, SqlFormat::Table).unwrap();
        assert_eq!(text, "volume   n\n------  --\na       75\nb       75\n");
    }

    #[test]
    fn nothing_can_be_changed() {
        let dir = history();
        let target = dir.path().join("stolen.csv");
        for query in [
            "DROP TABLE volume_stats",
            "CREATE TABLE x AS SELECT 1",
            "INSERT INTO events SELECT * FROM events",
            &format!("COPY volume_stats TO '{}'", target.display()),
            &format!(
                "CREATE EXTERNAL TABLE x STORED AS CSV LOCATION '{}'",
                target.display()
            ),
            "SET datafusion.execution.batch_size = 1",
            "DELETE FROM volume_stats",
        ] {
            let error = ask(dir.path(), query).unwrap_err();
            assert!(error.is_usage(), "{query}: {error}");
        }
        assert!(!target.exists());
        assert_eq!(
            ask(dir.path(), "SELECT count(*) AS n FROM volume_stats").unwrap()[0]["n"],
            150
        );
    }

    #[test]
    fn mistakes_and_damage_are_one_sentence() {
        let dir = history();
        for query in [
            "SELEC 1",
            "SELECT nothing FROM volume_stats",
            "SELECT * FROM nowhere",
            "",
            "SELECT '/etc/passwd'.x",
            "SELECT * FROM '/etc/passwd'",
        ] {
            let error = ask(dir.path(), query).unwrap_err().to_string();
            assert!(
                !error.contains('\n') && error.len() < 400,
                "{query}: {error}"
            );
        }
        let missing = ask(&dir.path().join("none"), "SELECT 1").unwrap_err();
        assert!(missing.to_string().contains("none"));
        let partition = partition::all_partitions(dir.path(), Table::VolumeStats)
            .unwrap()
            .remove(0);
        let path = partition::files(&partition.path).unwrap().remove(0);
        std::fs::write(&path, b"PAR1 this is no parquet PAR1").unwrap();
        let error = ask(dir.path(), "SELECT sum(read_ops) FROM volume_stats").unwrap_err();
        assert!(
            error.is_integrity() && error.to_string().contains(path.to_str().unwrap()),
            "{error}"
        );
    }

    #[test]
    fn a_query_that_needs_too_much_memory_says_so() {
        let dir = history();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let query = "SELECT array_agg(a.read_latency_histogram) FROM volume_stats a, volume_stats b, volume_stats c";
        let limits = SqlLimits {
            memory_bytes: 4 << 20,
        };
        let mut out = Vec::new();
        let run = run_sql(dir.path(), query, limits, SqlFormat::JsonLines, &mut out);
        let error = runtime.block_on(run).unwrap_err().to_string();
        assert!(error.contains("memory"), "{error}");
    }
}
