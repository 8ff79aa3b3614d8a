//! Just enough of BTF (Documentation/bpf/btf.rst in the kernel tree) to find where a member of a
//! kernel structure lies, and which prototype a tracepoint has. rustc emits no CO-RE relocations,
//! so the offsets are looked up here and given to the programs as read-only data.

use std::collections::HashMap;
use std::path::Path;

use soe_common::record::KernelOffsets;

/// Where the running kernel keeps its types.
pub const KERNEL_BTF: &str = "/sys/kernel/btf/vmlinux";
/// Where the types of the SCSI layer are, on kernels that have it as a module.
const SCSI_BTF: &str = "/sys/kernel/btf/scsi_mod";

const MAGIC: u16 = 0xeb9f;
const KIND_INT: u32 = 1;
const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUM: u32 = 6;
const KIND_TYPEDEF: u32 = 8;
const KIND_FUNC_PROTO: u32 = 13;
const KIND_VAR: u32 = 14;
const KIND_DATASEC: u32 = 15;
const KIND_DECL_TAG: u32 = 17;
const KIND_ENUM64: u32 = 19;
const KIND_MAX: u32 = 19;

/// Errors of reading the kernel's types.
#[derive(Debug, thiserror::Error)]
pub enum BtfError {
    /// The file could not be read.
    #[error(
        "cannot read the kernel's type information at {path}: {source}; a kernel built with CONFIG_DEBUG_INFO_BTF is needed"
    )]
    Read {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The bytes are not BTF.
    #[error("the kernel's type information is damaged: {what} at byte {at}")]
    Damaged {
        /// What is wrong.
        what: &'static str,
        /// Where.
        at: usize,
    },
    /// A member that change tracking needs is not there.
    #[error("this kernel has no {what}; change tracking needs it (Linux 5.18 or later)")]
    Missing {
        /// The structure member or tracepoint.
        what: String,
    },
}

#[derive(Clone, Copy, Debug)]
struct Type {
    name: u32,
    info: u32,
    /// Size in bytes, or the id of the type that this one refers to.
    size_or_type: u32,
    /// Where its trailing data begins, within the type section.
    data: usize,
}

impl Type {
    fn kind(self) -> u32 {
        (self.info >> 24) & 0x1f
    }
    fn count(self) -> usize {
        (self.info & 0xffff) as usize
    }
}

/// The types of one kernel.
pub struct Btf {
    types: Vec<Type>,
    section: Vec<u8>,
    strings: Vec<u8>,
    by_name: HashMap<String, Vec<u32>>,
}

fn u16_at(bytes: &[u8], at: usize) -> Result<u16, BtfError> {
    bytes
        .get(at..at + 2)
        .and_then(|b| b.try_into().ok())
        .map(u16::from_le_bytes)
        .ok_or(BtfError::Damaged {
            what: "end of data",
            at,
        })
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32, BtfError> {
    at.checked_add(4)
        .and_then(|end| bytes.get(at..end))
        .and_then(|b| b.try_into().ok())
        .map(u32::from_le_bytes)
        .ok_or(BtfError::Damaged {
            what: "end of data",
            at,
        })
}

impl Btf {
    /// The running kernel's types, those of a loaded SCSI layer included.
    pub fn of_kernel() -> Result<Self, BtfError> {
        let mut btf = Self::from_file(Path::new(KERNEL_BTF))?;
        if btf.size_of("scsi_cmnd").is_none()
            && let Ok(module) = std::fs::read(SCSI_BTF)
        {
            btf.append(&module)?;
        }
        Ok(btf)
    }

    /// The types in `path`.
    pub fn from_file(path: &Path) -> Result<Self, BtfError> {
        let bytes = std::fs::read(path).map_err(|source| BtfError::Read {
            path: path.display().to_string(),
            source,
        })?;
        Self::parse(&bytes)
    }

    /// Parses little-endian BTF. Never panics, whatever the bytes.
    pub fn parse(bytes: &[u8]) -> Result<Self, BtfError> {
        let mut btf = Self {
            types: vec![Type {
                name: 0,
                info: 0,
                size_or_type: 0,
                data: 0,
            }],
            section: Vec::new(),
            strings: Vec::new(),
            by_name: HashMap::new(),
        };
        btf.append(bytes)?;
        Ok(btf)
    }

    /// Takes in the types of a module. Its type ids and string offsets go on where those of the
    /// kernel, which it refers to, end: so both are simply laid end to end.
    fn append(&mut self, bytes: &[u8]) -> Result<(), BtfError> {
        if u16_at(bytes, 0)? != MAGIC {
            return Err(BtfError::Damaged {
                what: "no BTF magic",
                at: 0,
            });
        }
        let header = u32_at(bytes, 4)? as usize;
        let section = |offset_at: usize, what| -> Result<&[u8], BtfError> {
            let start = header.saturating_add(u32_at(bytes, offset_at)? as usize);
            let end = start.saturating_add(u32_at(bytes, offset_at + 4)? as usize);
            bytes
                .get(start..end)
                .ok_or(BtfError::Damaged { what, at: start })
        };
        let btf = self;
        let mut at = btf.section.len();
        btf.section
            .extend_from_slice(section(8, "type section out of bounds")?);
        btf.strings
            .extend_from_slice(section(16, "string section out of bounds")?);
        while at < btf.section.len() {
            let ty = Type {
                name: u32_at(&btf.section, at)?,
                info: u32_at(&btf.section, at + 4)?,
                size_or_type: u32_at(&btf.section, at + 8)?,
                data: at + 12,
            };
            let trailing = match ty.kind() {
                KIND_INT | KIND_VAR | KIND_DECL_TAG => 4,
                KIND_ARRAY => 12,
                KIND_STRUCT | KIND_UNION | KIND_DATASEC | KIND_ENUM64 => 12 * ty.count(),
                KIND_ENUM | KIND_FUNC_PROTO => 8 * ty.count(),
                kind if kind == 0 || kind > KIND_MAX => {
                    return Err(BtfError::Damaged {
                        what: "unknown kind",
                        at,
                    });
                }
                _ => 0,
            };
            let id = btf.types.len() as u32;
            if let (KIND_STRUCT | KIND_TYPEDEF, Some(name)) = (ty.kind(), btf.string(ty.name))
                && !name.is_empty()
            {
                let name = name.to_string();
                btf.by_name.entry(name).or_default().push(id);
            }
            btf.types.push(ty);
            at += 12 + trailing;
        }
        Ok(())
    }

    fn string(&self, offset: u32) -> Option<&str> {
        let rest = self.strings.get(offset as usize..)?;
        let end = rest.iter().position(|&b| b == 0)?;
        std::str::from_utf8(&rest[..end]).ok()
    }

    fn find(&self, name: &str, kind: u32) -> Option<Type> {
        self.by_name
            .get(name)?
            .iter()
            .filter_map(|&id| self.types.get(id as usize))
            .find(|ty| ty.kind() == kind)
            .copied()
    }

    /// Size of `struct name` in bytes.
    pub fn size_of(&self, name: &str) -> Option<u32> {
        self.find(name, KIND_STRUCT).map(|ty| ty.size_or_type)
    }

    /// Byte offset of `member` (which may be a path such as `bi_iter.bi_sector`, and may lie in
    /// anonymous structures or unions) within `struct name`.
    pub fn offset_of(&self, name: &str, member: &str) -> Option<u32> {
        let mut ty = self.find(name, KIND_STRUCT)?;
        let mut offset = 0;
        for part in member.split('.') {
            let (at, of) = self.member(ty, part, 0)?;
            offset += at;
            ty = self.resolve(of)?;
        }
        Some(offset)
    }

    /// Offset and type id of a direct or anonymously nested member.
    fn member(&self, ty: Type, name: &str, depth: u32) -> Option<(u32, u32)> {
        if !matches!(ty.kind(), KIND_STRUCT | KIND_UNION) || depth > 8 {
            return None;
        }
        // With the kind flag set, the upper byte of the offset is the width of a bit field.
        let bits_mask = if ty.info >> 31 == 1 {
            0x00ff_ffff
        } else {
            u32::MAX
        };
        for index in 0..ty.count() {
            let at = ty.data + 12 * index;
            let member_name = u32_at(&self.section, at).ok()?;
            let of = u32_at(&self.section, at + 4).ok()?;
            let bits = u32_at(&self.section, at + 8).ok()? & bits_mask;
            if self.string(member_name) == Some(name) {
                return Some((bits / 8, of));
            }
            if member_name == 0
                && let Some(inner) = self.resolve(of)
                && let Some((inner_at, inner_of)) = self.member(inner, name, depth + 1)
            {
                return Some((bits / 8 + inner_at, inner_of));
            }
        }
        None
    }

    /// Follows typedefs and qualifiers.
    fn resolve(&self, id: u32) -> Option<Type> {
        let mut ty = *self.types.get(id as usize)?;
        for _ in 0..16 {
            match ty.kind() {
                KIND_TYPEDEF | 9..=11 | 18 => ty = *self.types.get(ty.size_or_type as usize)?,
                _ => return Some(ty),
            }
        }
        None
    }

    /// Number of arguments of a tracepoint, without the leading private pointer; `None` where the
    /// kernel does not have it.
    pub fn tracepoint_arguments(&self, name: &str) -> Option<usize> {
        let typedef = self.find(&format!("btf_trace_{name}"), KIND_TYPEDEF)?;
        let pointer = self.types.get(typedef.size_or_type as usize)?;
        let proto = self.types.get(pointer.size_or_type as usize)?;
        (proto.kind() == KIND_FUNC_PROTO).then(|| proto.count().saturating_sub(1))
    }

    /// The offsets that the programs need.
    pub fn kernel_offsets(&self) -> Result<KernelOffsets, BtfError> {
        let at = |name: &str, member: &str| {
            self.offset_of(name, member)
                .ok_or_else(|| BtfError::Missing {
                    what: format!("member {member} in struct {name}"),
                })
        };
        for (tracepoint, arguments) in [
            ("block_bio_queue", 1),
            ("block_bio_complete", 2),
            ("block_rq_complete", 3),
            ("block_rq_issue", 1),
        ] {
            if self.tracepoint_arguments(tracepoint) != Some(arguments) {
                return Err(BtfError::Missing {
                    what: format!("tracepoint {tracepoint} with {arguments} arguments"),
                });
            }
        }
        Ok(KernelOffsets {
            bio_next: at("bio", "bi_next")?,
            bio_bdev: at("bio", "bi_bdev")?,
            bio_opf: at("bio", "bi_opf")?,
            bio_ioprio: at("bio", "bi_ioprio")?,
            bio_status: at("bio", "bi_status")?,
            bio_sector: at("bio", "bi_iter.bi_sector")?,
            bio_size: at("bio", "bi_iter.bi_size")?,
            bio_blkg: at("bio", "bi_blkg")?,
            bdev_disk: at("block_device", "bd_disk")?,
            disk_diskseq: at("gendisk", "diskseq")?,
            rq_q: at("request", "q")?,
            rq_bio: at("request", "bio")?,
            rq_cmd_flags: at("request", "cmd_flags")?,
            rq_sector: at("request", "__sector")?,
            rq_start: at("request", "start_time_ns")?,
            queue_disk: at("request_queue", "disk")?,
            blkg_blkcg: at("blkcg_gq", "blkcg")?,
            blkcg_cgroup: at("blkcg", "css.cgroup")?,
            cgroup_kn: at("cgroup", "kn")?,
            kn_id: at("kernfs_node", "id")?,
            rq_size: self.size_of("request").ok_or_else(|| BtfError::Missing {
                what: "struct request".into(),
            })?,
            scsi_cmnd: self.offset_of("scsi_cmnd", "cmnd").unwrap_or(u32::MAX),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// struct outer { u32 first; union { u32 a; u32 b; }; struct inner named; }
    fn sample() -> Vec<u8> {
        let mut strings = vec![0u8];
        let mut name = |s: &str| {
            let at = strings.len() as u32;
            strings.extend_from_slice(s.as_bytes());
            strings.push(0);
            at
        };
        let (int, outer, first, a, b, inner, named, deep) = (
            name("int"),
            name("outer"),
            name("first"),
            name("a"),
            name("b"),
            name("inner"),
            name("named"),
            name("deep"),
        );
        let words: Vec<u32> = [
            vec![int, KIND_INT << 24, 4, 32],
            vec![0, KIND_UNION << 24 | 2, 4, a, 1, 0, b, 1, 0],
            vec![inner, KIND_STRUCT << 24 | 1, 8, deep, 1, 32],
            vec![
                outer,
                KIND_STRUCT << 24 | 3,
                16,
                first,
                1,
                0,
                0,
                2,
                32,
                named,
                3,
                64,
            ],
        ]
        .concat();
        let types: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        let mut out = Vec::new();
        out.extend_from_slice(&MAGIC.to_le_bytes());
        out.extend_from_slice(&[1, 0]);
        for word in [
            24,
            0,
            types.len() as u32,
            types.len() as u32,
            strings.len() as u32,
        ] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        out.extend_from_slice(&types);
        out.extend_from_slice(&strings);
        out
    }

    /// BTF of a module over [`sample`]: struct module { struct inner of_kernel; u32 own; }
    fn module() -> Vec<u8> {
        let base = {
            let btf = Btf::parse(&sample()).unwrap();
            (btf.types.len() as u32, btf.strings.len() as u32, btf)
        };
        let (types_before, strings_before, btf) = base;
        let inner = btf.by_name["inner"][0];
        let strings = b"module\0of_kernel\0own\0";
        let at = |offset: u32| strings_before + offset;
        let words = [
            // A typedef first, so that an id of the module itself is referred to.
            vec![0, KIND_TYPEDEF << 24, 1],
            vec![
                at(0),
                KIND_STRUCT << 24 | 2,
                16,
                at(7),
                inner,
                64,
                at(17),
                types_before,
                32,
            ],
        ]
        .concat();
        let types: Vec<u8> = words.iter().flat_map(|w: &u32| w.to_le_bytes()).collect();
        let mut out = Vec::new();
        out.extend_from_slice(&MAGIC.to_le_bytes());
        out.extend_from_slice(&[1, 0]);
        let len = types.len() as u32;
        for word in [24, 0, len, len, strings.len() as u32] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        out.extend_from_slice(&types);
        out.extend_from_slice(strings);
        out
    }

    #[test]
    fn a_module_goes_on_where_the_kernel_ends() {
        let mut btf = Btf::parse(&sample()).unwrap();
        btf.append(&module()).unwrap();
        assert_eq!(btf.offset_of("module", "own"), Some(4));
        assert_eq!(btf.offset_of("module", "of_kernel.deep"), Some(12));
        assert_eq!(btf.offset_of("outer", "b"), Some(4));
    }

    #[test]
    fn finds_members_in_anonymous_unions_and_along_paths() {
        let btf = Btf::parse(&sample()).unwrap();
        assert_eq!(btf.offset_of("outer", "first"), Some(0));
        assert_eq!(btf.offset_of("outer", "b"), Some(4));
        assert_eq!(btf.offset_of("outer", "named.deep"), Some(12));
        assert_eq!(btf.offset_of("outer", "absent"), None);
        assert_eq!(btf.size_of("inner"), Some(8));
    }

    proptest! {
        #[test]
        fn damaged_bytes_never_panic(cut in 0usize..200, at in 0usize..200, value: u8) {
            let mut bytes = sample();
            let len = bytes.len();
            bytes[at % len] = value;
            bytes.truncate(len - cut.min(len));
            if let Ok(btf) = Btf::parse(&bytes) {
                let _ = btf.offset_of("outer", "named.deep");
                let _ = btf.kernel_offsets();
            }
        }
    }
}
