//! Parquet history: what was observed, decided and done, in files that anyone can read.
//!
//! `<dir>/<table>/dt=YYYY-MM-DD/hour=HH/*.parquet`; every column is described in
//! docs/history-schema.md. This is the only room that names arrow, parquet and datafusion: what goes
//! in and comes out are the rows of [`crate::window`].

mod columns;
mod contain;
mod disk;
mod error;
mod file;
mod flat;
mod import;
mod maintain;
mod merge;
mod partition;
#[cfg(feature = "sql")]
mod print;
#[cfg(feature = "sql")]
mod proven;
mod read;
mod rows_acts;
mod rows_stats;
mod scan;
#[cfg(feature = "sql")]
mod sql;
mod store;
mod table;

pub use error::{HistoryError, Result};
pub use file::Losses;
pub use flat::{FlatColumn, FlatTable, write_flat};
pub use import::{ImportFormat, ImportReport, export_csv, import_files};
pub use maintain::{Maintained, Retention};
pub use merge::Order;
pub use read::{HistoryReader, OnDamage, Query, RowStream};
#[cfg(feature = "sql")]
pub use sql::{SqlFormat, SqlLimits, run_sql};
pub use store::{HistoryStore, StoreConfig, StoreStats};
pub use table::{Table, TableRow};

#[cfg(test)]
mod fault_tests;
#[cfg(test)]
mod tests;
