//! Python packages for tests that look at SOE from outside, in a virtual environment of the build
//! directory that is made on demand and shared.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The Python of a virtual environment that has `packages`, each as its name for the installer and
/// its name for `import`.
///
/// # Errors
/// Why there can be none here, in words.
pub fn python(packages: &[(&str, &str)]) -> Result<PathBuf, String> {
    let folder = build_folder()?;
    // Tests run side by side, and two installers in one environment spoil it.
    let lock = File::create(folder.join("venv.lock")).map_err(|e| format!("venv.lock: {e}"))?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)
        .map_err(|e| format!("venv.lock: {e}"))?;
    let venv = folder.join("venv");
    let python = venv.join("bin/python");
    let modules: Vec<&str> = packages.iter().map(|(_, module)| *module).collect();
    let import = format!("import {}", modules.join(", "));
    if limited("60", &python)
        .args(["-c", &import])
        .output()
        .is_ok_and(|o| o.status.success())
    {
        return Ok(python);
    }
    if !python.exists() {
        run(
            "python3 -m venv",
            limited("120", Path::new("python3"))
                .args(["-m", "venv"])
                .arg(&venv),
        )?;
    }
    let names: Vec<&str> = packages.iter().map(|(name, _)| *name).collect();
    let what = format!("pip install {}", names.join(" "));
    run(
        &what,
        limited("300", &python)
            .args([
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
            ])
            .args(names),
    )?;
    run(&import, limited("60", &python).args(["-c", &import]))?;
    Ok(python)
}

/// The folder of the build directory in which this test program's profile lies.
fn build_folder() -> Result<PathBuf, String> {
    let test = std::env::current_exe().map_err(|e| format!("the test's own path: {e}"))?;
    let folder = test.ancestors().nth(3);
    folder
        .map(Path::to_path_buf)
        .ok_or_else(|| format!("{} lies in no build directory", test.display()))
}

fn limited(seconds: &str, program: &Path) -> Command {
    let mut command = Command::new("timeout");
    command.args(["-s", "KILL", seconds]).arg(program);
    command
}

fn run(what: &str, command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|e| format!("{what}: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let why = said
        .lines()
        .rfind(|line| !line.trim().is_empty())
        .unwrap_or("no reason given")
        .to_owned();
    Err(format!("{what}: {why}"))
}
