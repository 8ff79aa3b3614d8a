//! The freeze guard and the readers on this machine's kernel: loop devices with ext4, made and
//! removed here. Needs root; otherwise they are skipped, with the reason.

mod host;

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use host::{Loop, Volume, can_run, freezer, guard, guard_command, kill, must, text};
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};
use soe_agent::capture::guard::marker::thaw_left_frozen;
use soe_agent::capture::mounts::{Mounts, ProtectedPath, split};
use soe_agent::capture::{FreezeError, FreezeGuard, VolumeFreezer};
use soe_agent::io::{PlainReader, ReadOptions, UringReader, VolumeSpec};
use soe_agent::seam::{BlockReader, ByteRange, Unpaced};

const AGENT: &str = "SOE_TEST_AGENT_MOUNT";
const MARKER: &str = "SOE_TEST_AGENT_MARKER";

/// Not a test: an agent that freezes a volume for a minute, when the environment says so.
#[test]
fn agent_process() {
    let Some(mount) = std::env::var_os(AGENT) else {
        return;
    };
    let marker = std::env::var_os(MARKER).map(PathBuf::from);
    let guard = FreezeGuard::spawn(guard_command(), marker).expect("a guard");
    let device = split(fs::metadata(&mount).expect("the mount").dev());
    let superblocks = Mounts::default()
        .superblocks(&[device], &[])
        .expect("the superblocks");
    let freezer = guard.prepare(superblocks, 1).expect("prepared");
    let hold = freezer.freeze(Duration::from_secs(60)).expect("frozen");
    eprintln!("frozen {}", guard.pid());
    std::thread::sleep(Duration::from_secs(60));
    drop(hold);
}

/// Starts [`agent_process`] and returns it with its guard's pid, once the volume is frozen.
fn start_agent(volume: &Volume, marker: Option<&Path>) -> (Child, i32) {
    let mut command = Command::new(std::env::current_exe().expect("this binary"));
    command
        .args([
            "agent_process",
            "--exact",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(AGENT, volume.mount())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    if let Some(marker) = marker {
        command.env(MARKER, marker);
    }
    let mut agent = command.spawn().expect("an agent");
    let said = BufReader::new(agent.stderr.take().expect("its messages"));
    for line in said.lines().map_while(Result::ok) {
        if let Some(pid) = line.strip_prefix("frozen ") {
            return (agent, pid.parse().expect("a pid"));
        }
    }
    let _ = agent.kill();
    panic!("the agent did not freeze: {:?}", agent.wait());
}

#[test]
fn a_freeze_holds_writers_until_it_is_thawed() {
    if !can_run() {
        return;
    }
    let (one, two) = (Volume::new(), Volume::new());
    let guard = guard();
    let freezer = freezer(&guard, &[&one, &two]);
    freezer.flush().expect("flushed");
    // Twice, because the guard serves one freeze after the other.
    for _ in 0..2 {
        let hold = freezer.freeze(Duration::from_secs(20)).expect("frozen");
        let held = one.write();
        assert!(two.is_frozen());
        assert!(held.try_recv().is_err(), "a write went through a freeze");
        let thawed = hold.thaw().expect("thawed");
        assert!(thawed.intact);
        assert!(thawed.pause >= Duration::from_millis(400), "{thawed:?}");
        assert!(thawed.pause < Duration::from_secs(10), "{thawed:?}");
        assert!(held.recv_timeout(Duration::from_secs(10)).is_ok());
        assert!(two.thaws_within(Duration::from_secs(10)));
    }
    assert!(freezer.covers(0) && freezer.covers(1) && !freezer.covers(2));
    let pause = freezer.freeze_estimate() + freezer.thaw_estimate();
    assert!(pause > Duration::ZERO);
}

#[test]
fn dropping_a_hold_thaws() {
    if !can_run() {
        return;
    }
    let volume = Volume::new();
    let guard = guard();
    let freezer = freezer(&guard, &[&volume]);
    drop(freezer.freeze(Duration::from_secs(20)).expect("frozen"));
    assert!(volume.thaws_within(Duration::from_secs(10)));
}

#[test]
fn the_deadline_thaws_an_agent_that_does_not() {
    if !can_run() {
        return;
    }
    let volume = Volume::new();
    let guard = guard();
    let freezer = freezer(&guard, &[&volume]);
    let hold = freezer.freeze(Duration::from_millis(150)).expect("frozen");
    assert!(volume.thaws_within(Duration::from_secs(10)));
    let thawed = hold.thaw().expect("an answer");
    assert!(!thawed.intact, "the hold was over before: {thawed:?}");
    assert!(thawed.pause >= Duration::from_millis(150), "{thawed:?}");
    assert!(thawed.pause < Duration::from_secs(5), "{thawed:?}");
}

#[test]
fn what_somebody_else_froze_is_not_thawed() {
    if !can_run() {
        return;
    }
    let (theirs, free) = (Volume::new(), Volume::new());
    let guard = guard();
    let freezer = freezer(&guard, &[&free, &theirs]);
    must("fsfreeze", &["--freeze", text(theirs.mount())]);
    let error = freezer
        .freeze(Duration::from_secs(5))
        .err()
        .expect("a refusal");
    assert!(
        matches!(&error, FreezeError::AlreadyFrozen { mount } if mount == theirs.mount()),
        "{error}"
    );
    assert!(theirs.is_frozen(), "somebody else's freeze was undone");
    assert!(
        free.thaws_within(Duration::from_secs(10)),
        "the other volume of the group stayed frozen"
    );
    must("fsfreeze", &["--unfreeze", text(theirs.mount())]);
    assert!(theirs.thaws_within(Duration::from_secs(10)));
}

#[test]
fn a_thaw_by_somebody_else_is_noticed() {
    if !can_run() {
        return;
    }
    let volume = Volume::new();
    let guard = guard();
    let freezer = freezer(&guard, &[&volume]);
    let hold = freezer.freeze(Duration::from_secs(20)).expect("frozen");
    must("fsfreeze", &["--unfreeze", text(volume.mount())]);
    assert!(!hold.thaw().expect("an answer").intact);
}

#[test]
fn the_death_of_the_agent_thaws() {
    if !can_run() {
        return;
    }
    let volume = Volume::new();
    let (mut agent, _) = start_agent(&volume, None);
    assert!(volume.is_frozen());
    agent.kill().expect("killed");
    agent.wait().expect("its end");
    assert!(volume.thaws_within(Duration::from_secs(10)));
}

#[test]
fn the_death_of_the_guard_is_mended_by_the_agent() {
    if !can_run() {
        return;
    }
    let volume = Volume::new();
    let guard = guard();
    let freezer = freezer(&guard, &[&volume]);
    let hold = freezer.freeze(Duration::from_secs(60)).expect("frozen");
    kill(guard.pid() as i32);
    assert!(volume.is_frozen(), "a freeze outlives its process");
    let error = hold.thaw().expect_err("the guard is dead");
    assert!(matches!(error, FreezeError::Guard { .. }), "{error}");
    assert!(volume.thaws_within(Duration::from_secs(10)));
}

#[test]
fn what_guard_and_agent_left_frozen_is_thawed_at_the_next_start() {
    if !can_run() {
        return;
    }
    let volume = Volume::new();
    let folder = tempfile::tempdir().expect("a folder");
    let marker = folder.path().join("marker");
    let (mut agent, guard) = start_agent(&volume, Some(&marker));
    // Both are stopped first, so that neither can mend the other's death.
    let stop = rustix::process::Signal::STOP;
    let agent_pid = rustix::process::Pid::from_child(&agent);
    rustix::process::kill_process(agent_pid, stop).expect("stopped");
    kill(guard);
    agent.kill().expect("killed");
    agent.wait().expect("its end");
    assert!(volume.is_frozen(), "a freeze outlives its processes");
    let thawed = thaw_left_frozen(&marker).expect("thawed");
    assert_eq!(thawed, [volume.mount()]);
    assert!(volume.thaws_within(Duration::from_secs(10)));
    assert!(thaw_left_frozen(&marker).expect("nothing").is_empty());
}

#[test]
fn the_agents_own_filesystem_and_what_is_stacked_on_the_volume_are_refused() {
    if !can_run() {
        return;
    }
    let lower = Volume::new();
    let upper = Volume::inside(lower.mount());
    let refused = |path: PathBuf, role: &str| {
        let protected = [ProtectedPath {
            path,
            role: role.to_owned(),
        }];
        let volumes = [lower.number()];
        let found = Mounts::default().superblocks(&volumes, &protected);
        matches!(found, Err(FreezeError::Protected { .. }))
    };
    assert!(refused(lower.mount().join("state/deep"), "state"));
    assert!(refused(upper.mount().join("store"), "store"));
    assert!(!refused(PathBuf::from("/proc"), "logs"));
    let found = Mounts::default()
        .superblocks(&[lower.number()], &[])
        .expect("both filesystems");
    let depth = |mount: &Path| found.iter().find(|s| s.mount == mount).map(|s| s.depth);
    assert_eq!(depth(upper.mount()), Some(0));
    assert_eq!(depth(lower.mount()), Some(1));
    // And they can be frozen and thawed in that order, with the upper one's data in the lower one.
    let guard = guard();
    let freezer = guard.prepare(found, 1).expect("prepared");
    let hold = freezer.freeze(Duration::from_secs(20)).expect("frozen");
    assert!(upper.is_frozen() && lower.is_frozen());
    assert!(hold.thaw().expect("thawed").intact);
    assert!(upper.thaws_within(Duration::from_secs(10)));
}

/// A loop device with random content, and the content.
fn random_device(seed: u64) -> (Loop, Vec<u8>, tempfile::TempDir) {
    let folder = tempfile::tempdir().expect("a folder");
    let image = folder.path().join("image");
    let mut content = vec![0; 9 << 20];
    SmallRng::seed_from_u64(seed).fill_bytes(&mut content);
    fs::write(&image, &content).expect("an image file");
    (Loop::attach(&image), content, folder)
}

fn check_reader(reader: &dyn BlockReader, content: &[u8], seed: u64) {
    assert_eq!(reader.len(), content.len() as u64);
    let mut rng = SmallRng::seed_from_u64(seed);
    for unit in [512u32, 4096, 65536, 1 << 20] {
        let mut ranges = vec![ByteRange::new(0, content.len() as u64)];
        for _ in 0..20 {
            let offset = rng.random_range(0..content.len() as u64);
            let len = rng.random_range(0..=(content.len() as u64 - offset).min(3 << 20));
            ranges.push(ByteRange::new(offset, len));
        }
        // The whole first, then many odd ranges, each alone with a neighbour.
        for pair in ranges.chunks(2) {
            let mut seen = vec![0u8; content.len()];
            reader
                .read(pair, unit, &Unpaced, &mut |offset, data| {
                    let place = offset as usize..offset as usize + data.len();
                    assert_eq!(&content[place.clone()], data, "at {offset} by {unit}");
                    seen[place].iter_mut().for_each(|count| *count += 1);
                    Ok(())
                })
                .expect("read");
            for (at, count) in seen.iter().enumerate() {
                let at = at as u64;
                let wanted = pair.iter().any(|r| r.offset <= at && at < r.end());
                assert_eq!(*count, u8::from(wanted), "byte {at} by {unit}");
            }
        }
    }
}

#[test]
fn both_readers_give_every_byte_once() {
    if !can_run() {
        return;
    }
    let (device, content, _folder) = random_device(7);
    let whole = VolumeSpec::whole(&device.device);
    let slice = VolumeSpec {
        path: device.device.clone(),
        offset: 63 * 512,
        len: Some(5_000_192),
    };
    let part = &content[63 * 512..63 * 512 + 5_000_192];
    for options in [ReadOptions::BACKGROUND, ReadOptions::URGENT] {
        let mut options = options;
        options.max_request = 1 << 20;
        let uring = |spec| UringReader::open(spec, options).expect("io_uring");
        let plain = |spec| PlainReader::open(spec, options).expect("plain");
        check_reader(&uring(&whole), &content, 1);
        check_reader(&uring(&slice), part, 2);
        check_reader(&plain(&slice), part, 3);
    }
}

#[test]
fn readers_see_what_is_on_the_device_not_what_is_cached() {
    if !can_run() {
        return;
    }
    let (device, mut content, folder) = random_device(8);
    let reader = UringReader::open(&VolumeSpec::whole(&device.device), ReadOptions::URGENT)
        .expect("io_uring");
    // Changed behind the block device's page cache, which has the old bytes.
    let cached = fs::read(&device.device).expect("read through the cache");
    assert_eq!(cached, content);
    let image = File::options()
        .write(true)
        .open(folder.path().join("image"))
        .expect("the image");
    content[4096..8192].fill(0xab);
    image.write_all_at(&[0xab; 4096], 4096).expect("written");
    image.sync_all().expect("durable");
    reader
        .read(
            &[ByteRange::new(4096, 4096)],
            4096,
            &Unpaced,
            &mut |_, data| {
                assert!(data.iter().all(|byte| *byte == 0xab));
                Ok(())
            },
        )
        .expect("read");
}

#[test]
fn a_reader_goes_on_after_a_sink_that_failed() {
    if !can_run() {
        return;
    }
    let (device, content, _folder) = random_device(9);
    let reader = UringReader::open(&VolumeSpec::whole(&device.device), ReadOptions::BACKGROUND)
        .expect("io_uring");
    let all = [ByteRange::new(0, content.len() as u64)];
    let mut pieces = 0;
    let error = reader
        .read(&all, 65536, &Unpaced, &mut |_, _| {
            pieces += 1;
            if pieces == 5 {
                return Err(io::Error::other("the store is full"));
            }
            Ok(())
        })
        .expect_err("the sink failed");
    assert_eq!(error.to_string(), "the store is full");
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        reader.read(&all, 65536, &Unpaced, &mut |_, _| panic!("on purpose"))
    }));
    assert!(panicked.is_err());
    check_reader(&reader, &content, 4);
}

#[test]
fn errors_name_the_device_and_the_place() {
    if !can_run() {
        return;
    }
    let (device, content, folder) = random_device(10);
    let spec = VolumeSpec {
        path: device.device.clone(),
        offset: 0,
        len: Some(content.len() as u64 + 512),
    };
    let error = UringReader::open(&spec, ReadOptions::BACKGROUND)
        .err()
        .expect("too short");
    assert!(error.to_string().contains(text(&device.device)), "{error}");
    let whole = VolumeSpec::whole(&device.device);
    let uring = UringReader::open(&whole, ReadOptions::BACKGROUND).expect("io_uring");
    let plain = PlainReader::open(&whole, ReadOptions::BACKGROUND).expect("plain");
    // The device loses its second half under the readers.
    let image = File::options()
        .write(true)
        .open(folder.path().join("image"))
        .expect("the image");
    image.set_len(content.len() as u64 / 2).expect("truncated");
    let last = [ByteRange::new(content.len() as u64 - 4096, 4096)];
    for reader in [&uring as &dyn BlockReader, &plain] {
        let error = reader
            .read(&last, 4096, &Unpaced, &mut |_, _| Ok(()))
            .expect_err("nothing is there");
        let said = error.to_string();
        let place = (content.len() - 4096).to_string();
        assert!(said.contains(text(&device.device)), "{said}");
        assert!(said.contains(&place), "{said}");
    }
}
