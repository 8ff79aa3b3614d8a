//! Small files of the store: listed, read whole, written durably; and the store's own header.

use uuid::Uuid;

use super::catalog;
use super::error::LayerError;
use super::fs::{DirEntry, StoreFs};
use super::wire::Reader;

const HEADER_NAME: &str = "store";
const HEADER_MAGIC: &[u8; 8] = b"SOESTOR\0";
const HEADER_VERSION: u16 = 1;
const HEADER_LEN: usize = 36;

pub(super) fn list(fs: &dyn StoreFs, path: &str) -> Result<Vec<DirEntry>, LayerError> {
    fs.list(path)
        .map_err(|error| LayerError::io("list", path, error))
}

/// Reads a whole file of at most `max_len` bytes; what is longer is damaged.
pub(super) fn read_file(fs: &dyn StoreFs, path: &str, max_len: u64) -> Result<Vec<u8>, LayerError> {
    let missing_or_io = |call, error: std::io::Error| match error.kind() {
        std::io::ErrorKind::NotFound => LayerError::damaged(path, "the file is missing"),
        std::io::ErrorKind::UnexpectedEof => LayerError::damaged(path, "the file is cut short"),
        _ => LayerError::io(call, path, error),
    };
    let file = fs
        .open(path)
        .map_err(|error| missing_or_io("open", error))?;
    let len = file
        .len()
        .map_err(|error| LayerError::io("measure", path, error))?;
    if len > max_len {
        return Err(LayerError::damaged(
            path,
            format!("it has {len} bytes, more than the {max_len} it should have"),
        ));
    }
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(0, &mut bytes)
        .map_err(|error| missing_or_io("read", error))?;
    Ok(bytes)
}

/// Writes `bytes` under a temporary name, makes them durable and gives them their name, which must
/// not be taken. The name is durable only when the folder has been synced afterwards.
pub(super) fn write_durably(
    fs: &dyn StoreFs,
    folder: &str,
    temporary: &str,
    name: &str,
    bytes: &[u8],
) -> Result<(), LayerError> {
    let join = |name: &str| {
        if folder.is_empty() {
            name.to_owned()
        } else {
            format!("{folder}/{name}")
        }
    };
    let (temporary, name) = (join(temporary), join(name));
    let mut file = fs
        .create(&temporary)
        .map_err(|error| LayerError::io("create", &temporary, error))?;
    file.append(bytes)
        .map_err(|error| LayerError::io("write to", &temporary, error))?;
    file.sync()
        .map_err(|error| LayerError::io("sync", &temporary, error))?;
    fs.rename_no_replace(&temporary, &name)
        .map_err(|error| LayerError::io("rename to", &name, error))
}

/// The identity in the store's header; `None` when there is no header.
pub(super) fn read_header(fs: &dyn StoreFs) -> Result<Option<Uuid>, LayerError> {
    match fs.open(HEADER_NAME) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(LayerError::io("open", HEADER_NAME, error)),
        Ok(_) => {}
    }
    let bytes = read_file(fs, HEADER_NAME, HEADER_LEN as u64)?;
    decode_header(&bytes).map(Some)
}

fn decode_header(bytes: &[u8]) -> Result<Uuid, LayerError> {
    let damaged = || LayerError::damaged(HEADER_NAME, "it is not the header of a layer store");
    let (covered, sum) = bytes.split_last_chunk::<4>().ok_or_else(damaged)?;
    if bytes.len() != HEADER_LEN || crc32c::crc32c(covered).to_le_bytes() != *sum {
        return Err(damaged());
    }
    let mut fields = Reader::new(covered);
    if fields.take(8) != Some(HEADER_MAGIC.as_slice()) {
        return Err(damaged());
    }
    let (version, flags, reserved) = (fields.u16(), fields.u16(), fields.u32());
    if (version, flags, reserved) != (Some(HEADER_VERSION), Some(0), Some(0)) {
        return Err(LayerError::Unsupported {
            path: HEADER_NAME.into(),
            what: format!("store version {}", version.unwrap_or_default()),
        });
    }
    fields.uuid().ok_or_else(damaged)
}

pub(super) fn create_header(fs: &dyn StoreFs, id: Uuid) -> Result<Uuid, LayerError> {
    let mut bytes = Vec::with_capacity(HEADER_LEN);
    bytes.extend_from_slice(HEADER_MAGIC);
    bytes.extend_from_slice(&HEADER_VERSION.to_le_bytes());
    bytes.extend_from_slice(&[0; 6]);
    bytes.extend_from_slice(id.as_bytes());
    bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
    write_durably(fs, "", &catalog::temporary_name(id), HEADER_NAME, &bytes)?;
    fs.sync_dir("")
        .map_err(|error| LayerError::io("sync", "", error))?;
    Ok(id)
}
