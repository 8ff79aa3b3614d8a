//! Virtual time, and simulated disks that can lie, tear and lose power.
