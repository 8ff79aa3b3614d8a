//! Pure decisions: state, forecast, SLA and budget to intents with reasons. No I/O, no clock.
