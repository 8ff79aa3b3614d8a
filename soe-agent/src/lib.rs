//! The Snapshot Orchestration Engine's agent.
//!
//! The way of the data: `observe` turns kernel events into per-volume windows (`window`), which are
//! kept as Parquet (`history`) and feed the forecasters (`model`). The planner (`plan`) decides from
//! forecasts, SLAs and budgets; `capture` and `stage` act; `layer` keeps what was captured and
//! `restore` gives it back. `service` is the only place that builds the concrete parts.

pub mod seam;

pub mod books;

pub mod probe;

pub mod observe;

pub mod window;

pub mod sources;

pub mod history;

pub mod model;

pub mod plan;

pub mod capture;

pub mod layer;

pub mod stage;

pub mod restore;

pub mod io;

pub mod govern;

pub mod api;

pub mod cli;

pub mod config;

pub mod metrics;

pub mod service;

pub mod sim;
