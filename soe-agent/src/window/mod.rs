//! Events to one-second windows per volume, and features for the model.
