//! One value of every type, with every field set to something that could be told from another.

use soe_agent::api::types::*;
use soe_agent::seam::GenerationEnd;
use uuid::Uuid;

pub const T0: i64 = 1_772_366_400_000_000_000;

pub fn layer(volume: &str, sequence: u64) -> LayerInfo {
    LayerInfo {
        id: format!("layer-{sequence}"),
        group: "db".into(),
        volume: volume.into(),
        sequence,
        kind: if sequence == 1 {
            LayerKind::Baseline
        } else {
            LayerKind::Differential
        },
        level: ConsistencyLevel::Filesystem,
        method: CutMethod::Freeze,
        pause_us: 32_000,
        skew_us: 40,
        changed_blocks: 17,
        block_size_bytes: 65_536,
        bytes_read: 1_114_112,
        bytes_stored: 500_000,
        started_at: T0,
        cut_at: T0 + 1_000_000,
        finished_at: T0 + 2_000_000_001,
        generation: Some(Uuid::from_u128(7)),
        epoch: 7,
        rescan_reason: (sequence == 1).then_some(GenerationEnd::First),
        volume_bytes: 1 << 30,
        state_root: Some("ab".repeat(32)),
    }
}

pub fn prediction() -> Prediction {
    Prediction {
        load_now: Some(1.5e6),
        next_burst_at: Some(T0 + 3_600_000_000_000),
        burst_probability: Some(0.75),
        next_low_window: Some(TimeWindow {
            start: T0 + 60_000_000_000,
            end: T0 + 120_000_000_000,
        }),
        model: Some("ewma".into()),
        model_reason: Some("least loss over 7 days".into()),
    }
}

pub fn staging() -> StagingStatus {
    StagingStatus {
        budget_bytes: 8 << 30,
        staged_bytes: 3 << 20,
        valid_bytes: 2 << 20,
        used_bytes: 1 << 20,
        invalidated_bytes: 4096,
        hit_ratio: Some(0.5),
        precision: Some(0.25),
        switched_off: true,
    }
}

pub fn decision() -> Decision {
    Decision {
        at: T0,
        action: "capture".into(),
        reason: "quiet window, rpo half used".into(),
    }
}

pub fn volume_status(volume: &str) -> VolumeStatus {
    VolumeStatus {
        volume: volume.into(),
        device_id: "diskseq-9".into(),
        size_bytes: 1 << 30,
        generation: Some(Uuid::from_u128(7)),
        epoch: 7,
        tracking: TrackingState::Complete,
        rescan_reason: None,
        layers: 5,
        baseline_layers: 1,
        differential_layers: 4,
        last_layer: Some(layer(volume, 5)),
        changed_blocks_pending: Some(12),
        rpo_s: 900,
        rpo_age_s: Some(31),
        staging: staging(),
        predicted: prediction(),
        last_decision: Some(decision()),
        missing: None,
    }
}

/// A volume about which nothing is known yet.
pub fn fresh_volume_status(volume: &str) -> VolumeStatus {
    VolumeStatus {
        generation: None,
        tracking: TrackingState::Tainted,
        rescan_reason: Some(GenerationEnd::GapBoot),
        layers: 0,
        baseline_layers: 0,
        differential_layers: 0,
        last_layer: None,
        changed_blocks_pending: None,
        rpo_age_s: None,
        staging: StagingStatus::default(),
        predicted: Prediction::default(),
        last_decision: None,
        missing: Some("/dev/loop1 is not a volume: the device has no medium (size 0)".into()),
        ..volume_status(volume)
    }
}

pub fn group(name: &str, volumes: &[String]) -> GroupStatus {
    GroupStatus {
        group: name.into(),
        prediction_enabled: true,
        rpo_s: 900,
        max_pause_us: 100_000,
        p99_target_us: Some(5_000),
        app: Some("postgres".into()),
        criticality: Criticality::High,
        created_at: T0,
        missed_pause_budgets: 2,
        last_error: Some("store is full".into()),
        hosts: vec![HostMetadata {
            host: "storage-1".into(),
            app: Some("postgres".into()),
            criticality: Criticality::Low,
            p99_target_us: Some(7),
            rpo_s: Some(60),
        }],
        volumes: volumes.iter().map(|v| volume_status(v)).collect(),
    }
}

pub fn layer_detail() -> LayerDetail {
    LayerDetail {
        layer: layer("/dev/loop0", 2),
        parent: Some("layer-1".into()),
        delta_root: Some("cd".repeat(32)),
        zero_blocks: 3,
        compression: "zstd:1".into(),
        files: vec!["segment-1".into()],
    }
}

pub fn forecast() -> ForecastReport {
    ForecastReport {
        volume: "/dev/loop0".into(),
        issued_at: T0,
        bin_s: 300,
        predicted: prediction(),
        points: vec![ForecastPoint {
            start: T0,
            q10: 1.0,
            q50: 2.0,
            q80: 3.0,
            q90: 4.0,
            q95: 5.0,
            q99: 6.0,
            burst_probability: 0.25,
        }],
        history: vec![LoadPoint {
            start: T0 - 60,
            load: Some(7.0),
        }],
    }
}

pub fn model() -> ModelReport {
    ModelReport {
        volume: Some("/dev/loop0".into()),
        serving: "network".into(),
        reason: "least loss".into(),
        members: vec![MemberScore {
            member: "ewma".into(),
            quantile_loss: Some(0.25),
            matured: 9,
        }],
        trained_at: Some(T0),
        trained_on: Some(TimeWindow {
            start: T0 - 5,
            end: T0,
        }),
        training_samples: 1000,
        seed: Some(1),
        parameters: Some(14_000),
        effects: vec![EventEffect {
            kind: "com.example.deployment".into(),
            subject: Some("web".into()),
            events: 3.4,
            factor: 2.5,
            after_s: 300,
            burst_probability: 0.75,
            believed: true,
        }],
        starts: vec![StartScore {
            volumes: vec!["/dev/loop0".into()],
            by: "network".into(),
            intervals: 12.5,
            network_regret: Some(0.25),
            rule_regret: None,
        }],
        versions: vec![ModelVersion {
            version: Some(3),
            serving: true,
            trained_at: Some(T0),
            training_samples: 1000,
            score: Some(0.75),
            backtest: Some(0.5),
            unusable: Some("damaged".into()),
        }],
    }
}

pub fn event(id: &str) -> Event {
    Event {
        id: id.into(),
        source: "/ci".into(),
        kind: "com.example.deploy".into(),
        subject: Some("web".into()),
        time: T0,
        expected_at: Some(T0 + 1),
        volumes: vec!["/dev/loop0".into()],
        data: Some(serde_json::json!({"replicas": 3})),
    }
}

pub fn volume_info() -> VolumeInfo {
    VolumeInfo {
        volume: "/dev/loop0".into(),
        device_id: "diskseq-9".into(),
        kind: "loop".into(),
        size_bytes: 1 << 30,
        aliases: vec!["/dev/disk/by-id/x".into()],
        members: vec!["/dev/sda".into()],
        mounts: vec!["/mnt".into()],
        leaf: true,
        tracked: true,
        tracking: Some(TrackingState::Complete),
        group: Some("db".into()),
        untrackable: None,
    }
}

pub fn trace() -> TraceReport {
    TraceReport {
        volume: "/dev/loop0".into(),
        records: 10,
        dropped: 1,
        sampled_out: 2,
        window: TimeWindow {
            start: T0,
            end: T0 + 1_000_000_000,
        },
        files: vec!["io_trace/x.parquet".into()],
    }
}

pub fn load() -> LoadSample {
    LoadSample {
        volume: "/dev/loop0".into(),
        interval_ms: 1000,
        read_ops: 1,
        write_ops: 2,
        read_bytes: 4096,
        write_bytes: 8192,
        p99_latency_us: Some(900),
    }
}

pub fn watch_events() -> Vec<WatchEvent> {
    vec![
        WatchEvent::Load(load()),
        WatchEvent::Layer(Box::new(layer("/dev/loop0", 2))),
        WatchEvent::Decision {
            volume: "/dev/loop0".into(),
            decision: decision(),
        },
        WatchEvent::Staging(StageReport {
            volume: "/dev/loop0".into(),
            status: staging(),
        }),
        WatchEvent::Published {
            published: Box::new(event("e")),
        },
        WatchEvent::Tracking {
            volume: "/dev/loop0".into(),
            tracking: TrackingState::Tainted,
            reason: Some(GenerationEnd::Resize),
        },
        WatchEvent::Missed { items: 3 },
    ]
}
