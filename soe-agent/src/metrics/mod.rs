//! One registry of metric names with unit and meaning.
