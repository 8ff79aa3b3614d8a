//! Kernel modules: which of them the guest gets, and the two lists `modprobe` works from. Debian's
//! packages bring no lists (they are made at installation), so they are computed here from what each
//! module says of itself.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// What the tests use.
const WANTED: [&str; 24] = [
    "dm-mod",
    "dm-thin-pool",
    "dm-snapshot",
    "dm-delay",
    "dm-flakey",
    "dm-log-writes",
    "md-mod",
    "raid0",
    "raid1",
    "loop",
    "zram",
    "lzo-rle",
    "lz4",
    "null_blk",
    "nbd",
    "brd",
    "scsi_debug",
    "sd_mod",
    "mq-deadline",
    "xfs",
    "fuse",
    "crc32c_generic",
    "virtio_pci",
    "virtio_blk",
];

/// What only newer kernels have.
const WANTED_WHERE_PRESENT: [&str; 1] = ["ublk_drv"];

/// The modules of a guest.
pub struct Modules {
    /// File name and contents of each, uncompressed.
    pub files: Vec<(String, Vec<u8>)>,
    /// The contents of `modules.dep`.
    pub dep: String,
    /// The contents of `modules.alias`.
    pub alias: String,
}

/// One module's own words.
struct Module {
    file: String,
    data: Vec<u8>,
    depends: Vec<String>,
    aliases: Vec<String>,
}

/// Collects the wanted modules of the kernel in `dir`, and all they depend on.
pub fn collect(dir: &Path) -> Result<Modules> {
    let index = index(&dir.join("kernel"))?;
    let builtin = builtin(&dir.join("modules.builtin"))?;
    let mut modules = BTreeMap::new();
    for name in WANTED {
        add(name, &index, &builtin, &mut modules)?;
    }
    for name in WANTED_WHERE_PRESENT {
        if index.contains_key(&canonical(name)) {
            add(name, &index, &builtin, &mut modules)?;
        }
    }
    let mut dep = String::new();
    let mut alias = String::new();
    for (name, module) in &modules {
        dep.push_str(&format!("{}:", module.file));
        for needed in load_order(name, &modules) {
            dep.push_str(&format!(" {needed}"));
        }
        dep.push('\n');
        for other in &module.aliases {
            alias.push_str(&format!("alias {other} {name}\n"));
        }
    }
    let files = modules
        .into_values()
        .map(|module| (module.file, module.data))
        .collect();
    Ok(Modules { files, dep, alias })
}

/// The files a module needs, the nearest first, as `modules.dep` lists them: `modprobe` loads the
/// list from its end.
fn load_order(name: &str, modules: &BTreeMap<String, Module>) -> Vec<String> {
    let mut order = Vec::new();
    visit(name, modules, &mut BTreeSet::new(), &mut order);
    order.pop();
    order.reverse();
    order
}

fn visit(
    name: &str,
    modules: &BTreeMap<String, Module>,
    seen: &mut BTreeSet<String>,
    order: &mut Vec<String>,
) {
    let Some(module) = modules.get(name) else {
        return;
    };
    if seen.insert(name.to_owned()) {
        for needed in &module.depends {
            visit(needed, modules, seen, order);
        }
        order.push(module.file.clone());
    }
}

fn add(
    name: &str,
    index: &BTreeMap<String, PathBuf>,
    builtin: &BTreeSet<String>,
    modules: &mut BTreeMap<String, Module>,
) -> Result<()> {
    let name = canonical(name);
    if builtin.contains(&name) || modules.contains_key(&name) {
        return Ok(());
    }
    let Some(path) = index.get(&name) else {
        bail!("the kernel has no module {name}");
    };
    let data = uncompressed(path)?;
    let depends = said(&data, "depends=")
        .iter()
        .flat_map(|list| list.split(','))
        .filter(|one| !one.is_empty())
        .map(canonical)
        .collect::<Vec<_>>();
    let aliases = said(&data, "alias=")
        .into_iter()
        .filter(|alias| !alias.contains(char::is_whitespace))
        .collect();
    let module = Module {
        file: format!("{name}.ko"),
        data,
        depends: depends.clone(),
        aliases,
    };
    modules.insert(name, module);
    for needed in &depends {
        add(needed, index, builtin, modules)?;
    }
    Ok(())
}

/// The values of `key` in a module's information, which are strings that end with a zero byte.
fn said(module: &[u8], key: &str) -> Vec<String> {
    module
        .split(|byte| *byte == 0)
        .filter_map(|text| text.strip_prefix(key.as_bytes()))
        .map(|value| String::from_utf8_lossy(value).into_owned())
        .collect()
}

fn uncompressed(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_some_and(|extension| extension == "xz") {
        let xz = crate::place::program("xz")
            .context("xz is not installed, and the kernel's modules are compressed with it")?;
        let output = std::process::Command::new(xz)
            .args(["--decompress", "--stdout", "--"])
            .arg(path)
            .output()
            .with_context(|| format!("cannot uncompress {}", path.display()))?;
        if !output.status.success() {
            bail!(
                "cannot uncompress {}: xz: {}",
                path.display(),
                output.status
            );
        }
        return Ok(output.stdout);
    }
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Module names know no difference between `-` and `_`.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

fn module_name(file: &str) -> Option<String> {
    let name = file.rsplit('/').next()?;
    let name = name.strip_suffix(".xz").unwrap_or(name);
    name.strip_suffix(".ko").map(canonical)
}

fn builtin(list: &Path) -> Result<BTreeSet<String>> {
    let text =
        fs::read_to_string(list).with_context(|| format!("cannot read {}", list.display()))?;
    Ok(text.lines().filter_map(module_name).collect())
}

fn index(dir: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let mut found = BTreeMap::new();
    let mut left = vec![dir.to_path_buf()];
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                left.push(path);
            } else if let Some(name) = path.to_str().and_then(module_name) {
                found.insert(name, path);
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(name: &str, depends: &[&str]) -> (String, Module) {
        let depends = depends.iter().map(|name| (*name).to_owned()).collect();
        (
            name.to_owned(),
            Module {
                file: format!("{name}.ko"),
                data: Vec::new(),
                depends,
                aliases: Vec::new(),
            },
        )
    }

    #[test]
    fn a_module_is_listed_before_what_it_needs() {
        let modules = BTreeMap::from([
            module("thin", &["persistent", "prison", "dm"]),
            module("persistent", &["bufio"]),
            module("bufio", &["dm"]),
            module("prison", &["dm"]),
            module("dm", &[]),
        ]);
        let order = load_order("thin", &modules);
        let at = |file: &str| order.iter().position(|one| one == file).unwrap();
        assert_eq!(order.len(), 4);
        assert!(at("persistent.ko") < at("bufio.ko"));
        assert!(at("bufio.ko") < at("dm.ko"));
        assert!(at("prison.ko") < at("dm.ko"));
    }

    #[test]
    fn a_module_says_what_it_needs() {
        let data = b"\x7fELF..\0alias=block-major-7-*\0depends=a,b-c\0alias=devname:loop-control\0";
        assert_eq!(said(data, "depends="), ["a,b-c"]);
        assert_eq!(
            said(data, "alias="),
            ["block-major-7-*", "devname:loop-control"]
        );
        assert_eq!(
            module_name("kernel/drivers/md/dm-mod.ko.xz").as_deref(),
            Some("dm_mod")
        );
    }
}
