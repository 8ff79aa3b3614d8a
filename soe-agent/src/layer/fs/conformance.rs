//! What every [`StoreFs`] must do, run on the real one and on the simulated twin.

use std::io::ErrorKind;

use super::{DirEntry, DirFs, SimFs, StoreFs};

fn write(fs: &dyn StoreFs, path: &str, bytes: &[u8]) {
    let mut file = fs.create(path).unwrap();
    file.append(bytes).unwrap();
    file.sync().unwrap();
}

fn read(fs: &dyn StoreFs, path: &str) -> Vec<u8> {
    let file = fs.open(path).unwrap();
    let mut bytes = vec![0; file.len().unwrap() as usize];
    file.read_exact_at(0, &mut bytes).unwrap();
    bytes
}

fn names(fs: &dyn StoreFs, path: &str) -> Vec<(String, bool)> {
    let listed = fs.list(path).unwrap();
    let ours = listed.into_iter().filter(|entry| entry.name != "lock");
    ours.map(|DirEntry { name, is_dir }| (name, is_dir))
        .collect()
}

fn conforms(fs: &dyn StoreFs) {
    assert!(names(fs, "").is_empty());
    fs.create_dir("d").unwrap();
    assert_eq!(
        fs.create_dir("d").unwrap_err().kind(),
        ErrorKind::AlreadyExists
    );
    assert_eq!(
        fs.create_dir("x/d").unwrap_err().kind(),
        ErrorKind::NotFound
    );

    // Appended bytes are seen at once, also before a sync, also by a reader opened earlier.
    let mut file = fs.create("d/a").unwrap();
    let reader = fs.open("d/a").unwrap();
    assert!(reader.is_empty().unwrap());
    file.append(b"hello ").unwrap();
    file.append(b"world").unwrap();
    assert_eq!(reader.len().unwrap(), 11);
    file.sync().unwrap();
    assert_eq!(read(fs, "d/a"), b"hello world");
    let mut part = [0; 5];
    reader.read_exact_at(6, &mut part).unwrap();
    assert_eq!(&part, b"world");
    assert_eq!(
        reader.read_exact_at(7, &mut part).unwrap_err().kind(),
        ErrorKind::UnexpectedEof
    );
    assert_eq!(
        reader.read_exact_at(1 << 40, &mut part).unwrap_err().kind(),
        ErrorKind::UnexpectedEof
    );

    // Names: never replaced, neither by creating nor by renaming.
    assert_eq!(
        fs.create("d/a").err().unwrap().kind(),
        ErrorKind::AlreadyExists
    );
    assert_eq!(fs.open("d/b").err().unwrap().kind(), ErrorKind::NotFound);
    write(fs, "d/b", b"other");
    assert_eq!(
        fs.rename_no_replace("d/b", "d/a").unwrap_err().kind(),
        ErrorKind::AlreadyExists
    );
    assert_eq!(read(fs, "d/a"), b"hello world");
    assert_eq!(
        fs.rename_no_replace("d/missing", "d/c").unwrap_err().kind(),
        ErrorKind::NotFound
    );
    fs.rename_no_replace("d/b", "d/c").unwrap();
    assert_eq!(read(fs, "d/c"), b"other");
    fs.create_dir("d/e").unwrap();
    let expected =
        [("a", false), ("c", false), ("e", true)].map(|(name, is_dir)| (name.to_owned(), is_dir));
    assert_eq!(names(fs, "d"), expected);
    assert_eq!(names(fs, ""), [("d".to_owned(), true)]);
    fs.sync_dir("d").unwrap();
    fs.sync_dir("").unwrap();
    assert_eq!(
        fs.sync_dir("nowhere").unwrap_err().kind(),
        ErrorKind::NotFound
    );
    assert_eq!(fs.list("nowhere").unwrap_err().kind(), ErrorKind::NotFound);

    // Removal: files and empty folders; what is open stays readable.
    let open = fs.open("d/c").unwrap();
    fs.remove_file("d/c").unwrap();
    assert_eq!(
        fs.remove_file("d/c").unwrap_err().kind(),
        ErrorKind::NotFound
    );
    let mut bytes = [0; 5];
    open.read_exact_at(0, &mut bytes).unwrap();
    assert_eq!(&bytes, b"other");
    assert_eq!(
        fs.remove_dir("d").unwrap_err().kind(),
        ErrorKind::DirectoryNotEmpty
    );
    fs.remove_dir("d/e").unwrap();
    fs.remove_file("d/a").unwrap();
    fs.remove_dir("d").unwrap();
    assert!(names(fs, "").is_empty());

    assert!(fs.free_space().unwrap() > 0);
    let lock = fs.lock().unwrap();
    assert_eq!(fs.lock().err().unwrap().kind(), ErrorKind::WouldBlock);
    drop(lock);
    fs.lock().unwrap();
}

#[test]
fn a_folder_of_the_host_conforms() {
    let folder = tempfile::tempdir().unwrap();
    conforms(&DirFs::create(&folder.path().join("new/store")).unwrap());
}

#[test]
fn the_simulated_disk_conforms() {
    conforms(&SimFs::new(1));
}

#[test]
fn paths_of_the_host_do_not_follow_links_out_of_the_store() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("secret"), b"s").unwrap();
    let fs = DirFs::create(&folder.path().join("store")).unwrap();
    std::os::unix::fs::symlink("../secret", folder.path().join("store/link")).unwrap();
    assert!(fs.open("link").is_err());
}

#[test]
fn the_simulated_disk_forgets_what_was_not_synced_and_nothing_else() {
    let (mut lost_name, mut torn, mut kept) = (0, 0, 0);
    for seed in 0..200 {
        let fs = SimFs::new(seed);
        write(&fs, "synced", b"durable bytes");
        fs.sync_dir("").unwrap();
        let mut file = fs.create("unsynced").unwrap();
        file.append(&[7; 2000]).unwrap();
        let after = fs.after_power_cut(seed);
        assert_eq!(read(&after, "synced"), b"durable bytes");
        match after.open("unsynced") {
            Err(_) => lost_name += 1,
            Ok(_) if read(&after, "unsynced") == [7; 2000] => kept += 1,
            Ok(_) => torn += 1,
        }
    }
    assert!(
        lost_name > 50 && torn > 50 && kept > 0,
        "{lost_name} {torn} {kept}"
    );
}

#[test]
fn a_failed_sync_has_dropped_the_bytes_although_the_next_one_succeeds() {
    let mut lost = 0;
    for seed in 0..50 {
        let fs = SimFs::new(seed);
        let mut file = fs.create("f").unwrap();
        fs.sync_dir("").unwrap();
        file.append(&[7; 2000]).unwrap();
        fs.fault_at(fs.ops(), super::Fault::IoError);
        file.sync().unwrap_err();
        file.sync().unwrap();
        assert_eq!(read(&fs, "f"), [7; 2000]);
        lost += u32::from(read(&fs.after_power_cut(seed), "f") != [7; 2000]);
    }
    assert!(lost > 20, "{lost}");
}
