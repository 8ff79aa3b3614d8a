//! The agent's parts, and the rules by which they are kept together.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use soe_common::record::DiskStats;
use tokio::sync::{broadcast, oneshot};

use super::state::{Group, State, StateLock, boot_id};
use super::steps::Moment;
use super::{ServiceError, models};
use crate::api::engine::EngineError;
use crate::api::types::{Decision, LayerInfo, WatchEvent, WatchItem};
use crate::capture::guard::marker;
use crate::capture::mounts::{Mounts, ProtectedPath};
use crate::capture::{FreezeError, FreezeGuard, PathSettling};
use crate::config::{Bandwidth, Compression, Config};
use crate::history::{HistoryStore, Retention, StoreConfig};
use crate::io::{PacedBy, SystemClock};
use crate::layer::fs::DirFs;
use crate::layer::{LayerStore, StoreOptions};
use crate::metrics::Metrics;
use crate::model::mixture::{Mixture, MixtureConfig};
use crate::model::registry::Registry;
use crate::model::{LoadBin, TimeScale, VolumeName};
use crate::observe::disk::{DiskTrack, SliceMap};
use crate::observe::tracker::{Start, Tracker, TrackerOptions};
use crate::observe::volumes::{self, Volume};
use crate::plan::{Brain, Event, PlannerConfig};
use crate::seam::{ChangeMap, Clock, GenerationEnd};
use crate::stage::area::StageArea;
use crate::stage::chosen::Chosen;
use crate::stage::heat::{BurstHeat, BurstHeatConfig};
use crate::window::{Name, VolumeWindow};

/// How long after the last failed write a path is trusted again: longer than drivers retry.
const PATH_SETTLES_AFTER: Duration = Duration::from_secs(60);
/// Where no limit is configured: what the latency guard takes for full speed.
const FASTEST: u64 = 2 << 30;
/// Items a slow watcher may be behind.
const WATCH_BACKLOG: usize = 1024;

/// The planner and the forecasters: one owner of all decision state.
pub(super) struct Mind {
    pub(super) brain: Brain,
    pub(super) mixture: Mixture,
}

/// What the sampler keeps of one volume between two windows.
pub(super) struct Sampling {
    /// The totals at the end of the last window, and when that was.
    pub(super) last: Option<(Moment, Vec<DiskStats>)>,
    /// The bin being filled: its index and what is in it.
    pub(super) bin: Option<(i64, LoadBin)>,
    /// The first bin that was not told to the forecasters yet.
    pub(super) open: i64,
    /// Heat totals at the last heat interval.
    pub(super) heat: BTreeMap<u64, (u32, u32)>,
    /// Bytes and operations read since then.
    pub(super) read: (u64, u64),
    /// The newest window.
    pub(super) window: Option<VolumeWindow>,
    /// Whether the heat was told that a burst goes on.
    pub(super) bursting: bool,
}

/// One volume of a group.
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) volume: Volume,
    pub(super) map: SliceMap,
    pub(super) track: Arc<DiskTrack>,
    pub(super) pace: Arc<PacedBy<SystemClock>>,
    /// Why the present generation began.
    pub(super) reason: Mutex<GenerationEnd>,
    pub(super) settling: Mutex<PathSettling>,
    pub(super) sampling: Mutex<Sampling>,
    pub(super) heat: Mutex<BurstHeat>,
    /// What was chosen for the last burst, copied or not.
    pub(super) chosen: Mutex<Option<Chosen>>,
    /// How often staging was cancelled: copying goes on while this is what it was when it was asked for.
    pub(super) staging_cancels: AtomicU64,
    pub(super) last_decision: Mutex<Option<Decision>>,
}

type Waiter = oneshot::Sender<Result<Vec<LayerInfo>, EngineError>>;

/// The running agent.
pub struct Agent {
    _state_lock: StateLock,
    config: RwLock<Arc<Config>>,
    pub(super) scale: TimeScale,
    pub(super) clock: Arc<SystemClock>,
    pub(super) tracker: Tracker,
    pub(super) store: LayerStore,
    pub(super) history: HistoryStore,
    pub(super) guard: Mutex<Option<Arc<FreezeGuard>>>,
    /// The page that says what the guard holds.
    marker: PathBuf,
    pub(super) area: Option<StageArea>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) mind: Mutex<Mind>,
    /// The networks trained here. Taken before the mind where both are needed.
    pub(super) models: Mutex<Registry>,
    /// Held while the versions of the model are judged for a user.
    pub(super) judging: Mutex<()>,
    pub(super) state: Mutex<State>,
    pub(super) entries: Mutex<BTreeMap<String, Arc<Entry>>>,
    /// Entries of volumes that are gone, as long as somebody still works with them.
    pub(super) parted: Mutex<Vec<Arc<Entry>>>,
    pub(super) waiters: Mutex<BTreeMap<String, Vec<Waiter>>>,
    pub(super) errors: Mutex<BTreeMap<String, String>>,
    pub(super) watch: broadcast::Sender<WatchItem>,
    pub(super) stopping: AtomicBool,
    pub(super) ready: AtomicBool,
    /// Held by the capture that is under way.
    pub(super) capture_turn: Mutex<()>,
    /// Held by the call that takes an event.
    pub(super) event_turn: Mutex<super::events::Recent>,
    /// Whether a volume is being recorded.
    pub(super) recording: Mutex<bool>,
    /// Jobs on threads of their own, joined at the end.
    pub(super) jobs: Mutex<Vec<std::thread::JoinHandle<()>>>,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Agent {
    /// Opens every part. The order matters: the lock of the state folder first, tracking before
    /// anything that takes long.
    pub fn open(config: Config, metrics: Arc<Metrics>) -> Result<Self, ServiceError> {
        let state_dir = config.state_dir();
        // Before the thaw: what another agent froze a moment ago is not ours to thaw.
        let state_lock = StateLock::take(&state_dir)?;
        let marker = PathBuf::from("/dev/shm").join(format!(
            "soe-frozen-{}",
            blake3::hash(state_dir.as_os_str().as_encoded_bytes())
                .to_hex()
                .get(..12)
                .unwrap_or("0")
        ));
        match marker::thaw_left_frozen(&marker) {
            Ok(thawed) => {
                for mount in thawed {
                    tracing::error!(mount = %mount.display(), "thawed: a former agent and its guard were killed while it was frozen");
                }
            }
            Err(error) => {
                tracing::warn!(%error, "cannot tell whether a former agent left anything frozen")
            }
        }
        let state = State::load(&state_dir.join("state.json"))?;
        let bins = config
            .season_bins()
            .map_err(|reason| ServiceError::Model { reason })?;
        let scale = TimeScale::new(config.model.bin, bins).map_err(|e| ServiceError::Model {
            reason: e.to_string(),
        })?;
        let tracker = Tracker::open(TrackerOptions {
            pin_root: pin_root(),
            max_stamp_bytes: config.tracking.memory,
            min_block: u32::try_from(config.tracking.block_size).unwrap_or(64 << 10),
            ..TrackerOptions::default()
        })?;
        tracing::info!(start = ?tracker.start(), "kernel programs are attached");
        let compression = layer_compression(&config)?;
        let fs = DirFs::create(&config.store_dir()).map_err(|source| ServiceError::Folder {
            path: config.store_dir(),
            source,
        })?;
        let store = LayerStore::open(
            Arc::new(fs),
            StoreOptions {
                compression,
                ..StoreOptions::default()
            },
        )?;
        let history = HistoryStore::open(StoreConfig {
            retention: retention(&config),
            ..StoreConfig::new(config.history_dir())
        })?;
        let area = match &config.staging.path {
            Some(path) => Some(StageArea::open(path, config.staging.budget)?),
            None => None,
        };
        let guard = spawn_guard(&marker)?;
        let mut mixture = Mixture::new(MixtureConfig::new(scale));
        let models = models::registry(&state_dir)?;
        models::restore(&models, &mut mixture);
        let planner = planner_config(&config, scale, area.is_some());
        let (watch, _) = broadcast::channel(WATCH_BACKLOG);
        let agent = Self {
            _state_lock: state_lock,
            scale,
            clock: Arc::new(SystemClock),
            tracker,
            store,
            history,
            guard: Mutex::new(Some(Arc::new(guard))),
            marker,
            area,
            metrics,
            mind: Mutex::new(Mind {
                brain: Brain::new(planner),
                mixture,
            }),
            models: Mutex::new(models),
            judging: Mutex::default(),
            state: Mutex::new(state),
            entries: Mutex::default(),
            parted: Mutex::default(),
            waiters: Mutex::default(),
            errors: Mutex::default(),
            watch,
            stopping: AtomicBool::new(false),
            ready: AtomicBool::new(false),
            capture_turn: Mutex::new(()),
            event_turn: Mutex::default(),
            recording: Mutex::new(false),
            jobs: Mutex::default(),
            config: RwLock::new(Arc::new(config)),
        };
        agent
            .metrics
            .start_time
            .set([], agent.clock.now() as f64 / 1e9);
        agent.adopt_groups();
        agent.prime();
        agent.ready.store(true, Ordering::SeqCst);
        Ok(agent)
    }

    /// The configuration that is in effect.
    pub(super) fn config(&self) -> Arc<Config> {
        self.config
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Puts another configuration into effect, as far as it is asked for anew each time.
    pub(super) fn set_config(&self, config: Arc<Config>) {
        *self.config.write().unwrap_or_else(PoisonError::into_inner) = config;
    }

    /// Goes on with the groups of before. A volume that is not there now is reported, and tracked when
    /// it comes.
    fn adopt_groups(&self) {
        let groups: Vec<Group> = lock(&self.state).groups.values().cloned().collect();
        for group in &groups {
            for name in &group.volumes {
                if let Err(error) = self.adopt_volume(name) {
                    tracing::error!(group = group.name, volume = name, %error, "the volume cannot be tracked now");
                    lock(&self.errors).insert(group.name.clone(), error.to_string());
                }
            }
            match self.store.unreadable(&group.name) {
                Ok(damages) => {
                    for error in damages {
                        tracing::error!(group = group.name, %error, "a layer cannot be read; `soe layer verify` shows what is affected");
                    }
                }
                Err(error) => {
                    tracing::error!(group = group.name, %error, "the layers cannot be listed")
                }
            }
            self.tell_brain_of(group);
        }
        if let Err(error) = self.give_slots_back() {
            tracing::warn!(%error, "disks that no group needs are still tracked");
        }
    }

    /// Begins tracking a volume that a user puts into a group, unless a capture of it would freeze
    /// what the agent itself writes to.
    pub(super) fn adopt_new_volume(&self, name: &str) -> Result<Arc<Entry>, ServiceError> {
        let volume = volumes::resolve(std::path::Path::new(name))?;
        self.refuse_own_filesystem(&volume)?;
        self.adopt_volume(name)
    }

    /// Fails when something of the agent's own lies on a filesystem of `volume`.
    fn refuse_own_filesystem(&self, volume: &Volume) -> Result<(), ServiceError> {
        let device = (
            rustix::fs::major(volume.rdev),
            rustix::fs::minor(volume.rdev),
        );
        match Mounts::default().superblocks(&[device], &self.protected()) {
            Err(error @ FreezeError::Protected { .. }) => Err(error.into()),
            // Whatever else hinders a freeze is told by the capture that needs one.
            _ => Ok(()),
        }
    }

    /// Begins (or goes on) tracking a volume.
    pub(super) fn adopt_volume(&self, name: &str) -> Result<Arc<Entry>, ServiceError> {
        if let Some(entry) = self.entry(name) {
            return Ok(entry);
        }
        let volume = volumes::resolve(std::path::Path::new(name))?;
        self.wait_until_free(&volume);
        let last_boot = lock(&self.state).boot_id.clone();
        // Held until the entry is in it, so that nobody takes its slot for one that is not needed.
        let mut entries = lock(&self.entries);
        if let Some(entry) = entries.get(name) {
            return Ok(entry.clone());
        }
        self.refuse_while_held(&volume)?;
        let (track, began) = self.tracker.track(&volume.disk)?;
        let map = SliceMap::new(track.clone(), name, volume.start, volume.end)?;
        let rate = self.ceiling();
        // Why a generation began while nobody looked, if one did: the newest layer knows the old one.
        let reason = match began {
            Some(end @ (GenerationEnd::Resize | GenerationEnd::Remapped)) => end,
            Some(_) if last_boot.is_empty() => GenerationEnd::First,
            Some(_) if last_boot != boot_id() => GenerationEnd::GapBoot,
            Some(_) => GenerationEnd::GapMiss,
            None => GenerationEnd::First,
        };
        // The first window begins now; what the kernel counted while no agent ran belongs to none.
        let last = track.stats().ok();
        let last = last.map(|stats| (Moment::now(&*self.clock), stats));
        let heat = track
            .heat()
            .into_iter()
            .map(|(region, heat)| (region, (heat.reads, heat.writes)))
            .collect();
        let region = soe_common::SECTOR_SIZE << track.geometry().region_shift;
        let entry = Arc::new(Entry {
            name: name.to_string(),
            pace: Arc::new(PacedBy::new(SystemClock, rate)),
            reason: Mutex::new(reason),
            settling: Mutex::new(PathSettling::new(PATH_SETTLES_AFTER, 0)),
            sampling: Mutex::new(Sampling {
                last,
                bin: None,
                open: i64::MIN / 2,
                heat,
                read: (0, 0),
                window: None,
                bursting: false,
            }),
            heat: Mutex::new(BurstHeat::new(BurstHeatConfig {
                unit_bytes: u32::try_from(region).unwrap_or(1 << 20),
                ..BurstHeatConfig::default()
            })),
            chosen: Mutex::new(None),
            staging_cancels: AtomicU64::new(0),
            last_decision: Mutex::new(None),
            volume,
            map,
            track,
        });
        entries.insert(name.to_string(), entry.clone());
        drop(entries);
        let disks = entry.volume.disk.bottom();
        let placed = Event::VolumePlaced {
            volume: VolumeName::from(&*entry.name),
            disks: disks.iter().map(|disk| disk.as_str().into()).collect(),
        };
        // It is only taken note of.
        let _ = lock(&self.mind).brain.apply(placed, self.clock.now());
        Ok(entry)
    }

    /// Bytes a second that background reads of one volume may take at most.
    pub(super) fn ceiling(&self) -> u64 {
        match self.config().limits.capture_bandwidth {
            Bandwidth::Auto => FASTEST,
            Bandwidth::BytesPerSecond(rate) => rate,
        }
    }

    /// Tells the brain of a group, with what its layers say of the time before.
    pub(super) fn tell_brain_of(&self, group: &Group) {
        let manifests = self.store.manifests(&group.name).unwrap_or_default();
        let last_capture = manifests.last().map(|m| m.cut_at);
        let last_baseline = manifests
            .iter()
            .rev()
            .find(|m| {
                m.volumes
                    .iter()
                    .all(|v| v.kind == crate::layer::LayerKind::Baseline)
            })
            .map(|m| m.cut_at);
        let event = crate::plan::Event::GroupCreated {
            spec: self.plan_spec(group),
            last_capture,
            last_baseline,
        };
        // Nothing is decided here; the next tick does.
        let _ = lock(&self.mind).brain.apply(event, self.clock.now());
    }

    /// A group in the planner's words, with the configured defaults filled in.
    pub(super) fn plan_spec(&self, group: &Group) -> crate::plan::GroupSpec {
        use crate::api::types::Criticality;
        crate::plan::GroupSpec {
            name: group.name.as_str().into(),
            volumes: group.volumes.iter().map(|v| v.as_str().into()).collect(),
            prediction_enabled: group.prediction_enabled,
            rpo: self.rpo(group),
            max_pause: self.max_pause(group),
            p99_target: group.p99_target_us.map(Duration::from_micros),
            app: group.app.clone(),
            criticality: match group.criticality {
                Criticality::Low => crate::plan::Criticality::Low,
                Criticality::Normal => crate::plan::Criticality::Normal,
                Criticality::High => crate::plan::Criticality::High,
            },
        }
    }

    pub(super) fn rpo(&self, group: &Group) -> Duration {
        group
            .rpo_s
            .map_or(self.config().plan.rpo, Duration::from_secs)
    }

    pub(super) fn max_pause(&self, group: &Group) -> Duration {
        group
            .max_pause_us
            .map_or(self.config().plan.max_pause, Duration::from_micros)
    }

    /// Paths that must never lie on a filesystem that is frozen.
    pub(super) fn protected(&self) -> Vec<ProtectedPath> {
        let mut paths = vec![
            ProtectedPath {
                path: self.config().state_dir(),
                role: "the agent's state".into(),
            },
            ProtectedPath {
                path: self.config().store_dir(),
                role: "the layer store".into(),
            },
            ProtectedPath {
                path: self.config().history_dir(),
                role: "the history".into(),
            },
        ];
        if let Some(path) = &self.config().staging.path {
            paths.push(ProtectedPath {
                path: path.clone(),
                role: "the staging area".into(),
            });
        }
        paths
    }

    /// Keeps a change of the groups.
    pub(super) fn save_state(&self) -> Result<(), ServiceError> {
        let state = lock(&self.state).clone();
        Ok(state.save(&self.config().state_dir().join("state.json"))?)
    }

    /// All entries. A loop over them must not hold their lock: what it does may ask for an entry.
    pub(super) fn all_entries(&self) -> Vec<Arc<Entry>> {
        lock(&self.entries).values().cloned().collect()
    }

    pub(super) fn entry(&self, name: &str) -> Option<Arc<Entry>> {
        lock(&self.entries).get(name).cloned()
    }

    pub(super) fn tell(&self, event: WatchEvent) {
        // No watcher is no error.
        let _ = self.watch.send(WatchItem {
            at: self.clock.now(),
            event,
        });
    }

    pub(super) fn stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    /// The freeze guard; `None` when the agent is closing.
    pub(super) fn guard(&self) -> Option<Arc<FreezeGuard>> {
        lock(&self.guard).clone()
    }

    /// Starts another freeze guard in the place of one that failed.
    pub(super) fn replace_guard(&self) {
        let mut guard = lock(&self.guard);
        if guard.is_none() {
            // The agent is closing.
            return;
        }
        match spawn_guard(&self.marker) {
            Ok(fresh) => {
                tracing::warn!("the freeze guard failed and was started anew");
                *guard = Some(Arc::new(fresh));
            }
            Err(error) => {
                tracing::error!(%error, "the freeze guard failed and cannot be started anew; captures hold nobody until it can")
            }
        }
    }

    /// How tracking began.
    pub fn start(&self) -> Start {
        self.tracker.start()
    }

    /// Host name for the history.
    pub(super) fn host(&self) -> Name {
        self.config().host_name().into()
    }

    /// Ends background work, writes out the history, and saves which boot this was.
    pub fn close(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        for entry in self.all_entries() {
            entry.pace.cancel();
        }
        let jobs = std::mem::take(&mut *lock(&self.jobs));
        for job in jobs {
            if job.join().is_err() {
                tracing::error!("a background job ended by a panic");
            }
        }
        if let Err(error) = self.history.flush() {
            tracing::error!(%error, "the last rows of the history could not be written");
        }
        if let Err(error) = self.save_state() {
            tracing::error!(%error, "the state could not be saved");
        }
        // The guard ends with its socket; when it has ended it holds nothing, so there is nothing to note.
        let guard = lock(&self.guard).take().and_then(Arc::into_inner);
        if let Some(guard) = guard {
            drop(guard);
            let _ = std::fs::remove_file(&self.marker);
        }
    }

    /// Ends the present generation of a volume: its next layer is a rescan.
    pub(super) fn end_generation(
        &self,
        entry: &Entry,
        reason: GenerationEnd,
    ) -> Result<(), ServiceError> {
        entry.track.begin_generation()?;
        *lock(&entry.reason) = reason;
        self.metrics
            .rescans
            .with([entry.name.as_str(), &reason.to_string()])
            .inc();
        tracing::warn!(volume = entry.name, %reason, "the change map's generation ended; the next layer reads everything");
        self.tell(WatchEvent::Tracking {
            volume: entry.name.clone(),
            tracking: entry.map.tracking().into(),
            reason: Some(reason),
        });
        Ok(())
    }
}

/// The store's word for `store.compression`.
pub(super) fn layer_compression(
    config: &Config,
) -> Result<crate::layer::Compression, ServiceError> {
    match config.store.compression {
        Compression::None => Ok(crate::layer::Compression::Raw),
        Compression::Zstd(1) => Ok(crate::layer::Compression::Zstd1),
        Compression::Zstd(level) => Err(ServiceError::Compression { level }),
    }
}

/// What is kept of the history.
pub(super) fn retention(config: &Config) -> Retention {
    Retention {
        max_age: Some(config.history.retention),
        max_bytes: Some(config.history.max_size),
        min_free_bytes: Some(config.history.min_free),
    }
}

/// The planner's settings; without a staging area nothing is staged.
pub(super) fn planner_config(config: &Config, scale: TimeScale, has_area: bool) -> PlannerConfig {
    let mut planner = PlannerConfig::new(scale);
    planner.tick = config.plan.tick;
    planner.baseline_every = config.plan.baseline_every;
    planner.train_every = config.model.train_every;
    planner.train_after = config.model.train_after;
    planner.earliest_share = config.plan.earliest;
    planner.idle = config.plan.idle as f64;
    planner.staging.enabled = has_area;
    planner.staging.alarm = config.plan.stage_above;
    planner.staging.least_precision = config.plan.stage_precision;
    planner.staging.budget_bytes = config.staging.budget;
    planner
}

/// Folder of the pins; tests and second agents on one host choose another.
fn pin_root() -> PathBuf {
    std::env::var_os("SOE_PIN_ROOT").map_or_else(
        || crate::observe::tracker::DEFAULT_PIN_ROOT.into(),
        PathBuf::from,
    )
}

fn spawn_guard(marker: &std::path::Path) -> Result<FreezeGuard, ServiceError> {
    let binary = std::env::current_exe().map_err(|source| ServiceError::Folder {
        path: "/proc/self/exe".into(),
        source,
    })?;
    let mut command = std::process::Command::new(binary);
    command.arg("freeze-guard");
    Ok(FreezeGuard::spawn(command, Some(marker.to_path_buf()))?)
}
