//! Parquet in and out, retention, SQL: the only room that names arrow, parquet and datafusion.
