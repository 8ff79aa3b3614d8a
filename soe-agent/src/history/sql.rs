//! SQL over the history, read-only and in bounded memory.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use arrow::datatypes::DataType;
use datafusion::common::DataFusionError;
use datafusion::datasource::file_format::parquet::ParquetFormat;
use datafusion::datasource::listing::{
    ListingOptions, ListingTable, ListingTableConfig, ListingTableUrl,
};
use datafusion::execution::context::SQLOptions;
use datafusion::execution::object_store::ObjectStoreUrl;
use datafusion::execution::runtime_env::RuntimeEnvBuilder;
use datafusion::prelude::{SessionConfig, SessionContext};
use futures::StreamExt;
use rustix::fs::{FlockOperation, flock};

use super::contain::{Panicked, contained_future};
use super::error::{HistoryError, Result, one_line};
use super::partition::SUFFIX;
use super::print::Printer;
use super::proven::ProvenFiles;
use super::table::Table;

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
    // While this is held the agent begins no maintenance; without it a query is run again when a
    // compaction takes its files away.
    let _ = flock(&folder, FlockOperation::LockShared);
    let absolute = fs::canonicalize(dir).map_err(HistoryError::io("resolve", dir))?;
    let mut attempt = 0;
    loop {
        attempt += 1;
        let mut printer = Printer::new(format, out);
        let files =
            Arc::new(
                ProvenFiles::new(dir, &absolute).map_err(|error| HistoryError::QueryRun {
                    reason: one_line(&error.to_string()),
                })?,
            );
        let ran = run(&absolute, &files, query, limits, &mut printer);
        let failure = match contained_future(ran).await {
            Ok(Ok(())) => return printer.finish(),
            Ok(Err(Failure::History(error))) => return Err(error),
            Ok(Err(Failure::Engine(error))) => error,
            Err(Panicked(message)) => {
                let reason = format!("the query engine gave up ({})", one_line(&message));
                return Err(files
                    .take_error()
                    .unwrap_or(HistoryError::QueryRun { reason }));
            }
        };
        if let Some(error) = files.take_error() {
            return Err(error);
        }
        if !(printer.nothing_out() && attempt < RETRIES && is_not_found(&failure)) {
            return Err(explain(&failure));
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
    files: &Arc<ProvenFiles>,
    query: &str,
    limits: SqlLimits,
    printer: &mut Printer<'_>,
) -> Result<(), Failure> {
    let context = context(limits)?;
    context.register_object_store(ObjectStoreUrl::local_filesystem().as_ref(), files.clone());
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
    // A trailing slash makes it a folder, which need not exist.
    let text = format!("{}/", dir.join(table.name()).display());
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

fn explain(error: &DataFusionError) -> HistoryError {
    match error.find_root() {
        DataFusionError::ResourcesExhausted(_) => HistoryError::QueryRun {
            reason: "it needs more memory than it may use; ask for fewer columns, a shorter range or LIMIT".into(),
        },
        other => HistoryError::QueryRun { reason: sentence(other) },
    }
}

fn is_not_found(error: &DataFusionError) -> bool {
    let text = error.to_string();
    text.contains("not found") || text.contains("No such file")
}

#[cfg(test)]
#[path = "sql_tests.rs"]
mod tests;
