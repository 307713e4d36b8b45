//! Making a node's container runtimes use hostd, and taking that back.

use super::args::{InstallArguments, PlaceArguments};
use crate::{
    cni::{PLUGIN, check_network},
    config::{Attach, Config},
    store::{Durability, replace_file},
};
use anyhow::{Context, bail};
use serde_json::{Value, json};
use std::{
    env, fs,
    io::{ErrorKind, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

/// The plugin and the network's configuration, each as a whole or not at all; the configuration last, since runtimes use
/// a network as soon as there is one.
pub fn install(arguments: &InstallArguments, out: &mut impl Write) -> anyhow::Result<()> {
    check_network(&arguments.places.network).map_err(anyhow::Error::msg)?;
    let config = Config::read(&arguments.config)?;
    let source = match &arguments.plugin {
        Some(path) => path.clone(),
        None => env::current_exe()?.with_file_name(PLUGIN),
    };
    let plugin = fs::read(&source).with_context(|| {
        let source = source.display();
        format!("{source}: the plugin is built with hostd and stays beside it, or `--plugin` says where it is")
    })?;
    let places = &arguments.places;
    let (binary, list) = (places.binary(), places.list());
    let others = chained(&list)?;
    for folder in [&places.bin_dir, &places.conf_dir] {
        fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    }
    // Under a name that no runtime starts until it may be executed.
    let aside = places.aside();
    fs::write(&aside, &plugin)
        .and_then(|()| fs::set_permissions(&aside, fs::Permissions::from_mode(0o755)))
        .and_then(|()| fs::File::open(&aside)?.sync_all())
        .and_then(|()| fs::rename(&aside, &binary))
        .and_then(|()| fs::File::open(&places.bin_dir)?.sync_all())
        .with_context(|| format!("write {}", binary.display()))?;
    if others.iter().any(|plugin| plugin["type"] == "bandwidth") && config.attach != Attach::Tcx {
        writeln!(
            out,
            "{}: `bandwidth` needs the qdisc `ingress`, whose place pods' first filters take: set `attach = \"tcx\"` in {} (Linux 6.6 and \
             later). Between pods it limits nothing",
            list.display(),
            arguments.config.display()
        )?;
    }
    let text = serde_json::to_string_pretty(&network(arguments, &config, others))? + "\n";
    replace_file(&list, text.as_bytes(), Durability::Disk)?;
    writeln!(out, "installed {} and {}", binary.display(), list.display())?;
    Ok(())
}

/// Takes both away, the configuration first; that they are not there is no error. The plugin stays while another network of
/// hostd's needs it.
pub fn uninstall(places: &PlaceArguments, out: &mut impl Write) -> anyhow::Result<()> {
    check_network(&places.network).map_err(anyhow::Error::msg)?;
    let list = places.list();
    chained(&list)?;
    let mut files = vec![list.clone()];
    match places.other_user(&list)? {
        None => files.extend([places.binary(), places.aside()]),
        Some(other) => writeln!(out, "{} stays: {} uses it", places.binary().display(), other.display())?,
    }
    for file in files {
        match fs::remove_file(&file) {
            Ok(()) => writeln!(out, "removed {}", file.display())?,
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("remove {}", file.display())),
        }
    }
    Ok(())
}

/// The list of plugins that makes a network: ours, among those that others have chained to it.
fn network(arguments: &InstallArguments, config: &Config, chained: Vec<Value>) -> Value {
    let ours = json!({
        "type": PLUGIN,
        "socket": config.socket,
        "namespace": arguments.namespace,
        "capabilities": { "ips": true, "labels": true },
    });
    let mut plugins = chained;
    match plugins.iter_mut().find(|plugin| plugin["type"] == PLUGIN) {
        Some(before) => *before = ours,
        None => plugins.push(ours),
    }
    json!({
        "cniVersion": "1.0.0",
        "cniVersions": ["0.4.0", "1.0.0", "1.1.0"],
        "name": arguments.places.network,
        "plugins": plugins,
    })
}

/// The plugins of a list that is there, which must have ours among them.
fn chained(list: &Path) -> anyhow::Result<Vec<Value>> {
    let text = match fs::read_to_string(list) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.with_context(|| format!("read {}", list.display()))?,
    };
    let value: Value = serde_json::from_str(&text).unwrap_or_default();
    let plugins = value["plugins"].as_array().cloned().unwrap_or_default();
    if plugins.iter().any(|plugin| plugin["type"] == PLUGIN) {
        return Ok(plugins);
    }
    let types: Vec<String> = plugins.iter().map(|plugin| plugin["type"].to_string()).collect();
    bail!(
        "{} is not ours: its plugins are [{}], without {PLUGIN}; nothing is changed (`--network` gives another name)",
        list.display(),
        types.join(", ")
    )
}

impl PlaceArguments {
    fn binary(&self) -> PathBuf {
        self.bin_dir.join(PLUGIN)
    }

    fn aside(&self) -> PathBuf {
        self.bin_dir.join(format!(".{PLUGIN}.new"))
    }

    fn list(&self) -> PathBuf {
        self.conf_dir.join(format!("10-{}.conflist", self.network))
    }

    /// Another network's configuration that names our plugin. Runtimes read these endings (`ConfFiles` in libcni's `api.go`).
    fn other_user(&self, list: &Path) -> anyhow::Result<Option<PathBuf>> {
        let context = || format!("list {}", self.conf_dir.display());
        let files = match fs::read_dir(&self.conf_dir) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            other => other.with_context(context)?,
        };
        for file in files {
            let path = file.with_context(context)?.path();
            let ending = path.extension().and_then(|ending| ending.to_str());
            if path == list || !matches!(ending, Some("conf" | "conflist" | "json")) {
                continue;
            }
            // What is no JSON is no network, and one that is gone by now is none either.
            let text = fs::read(&path).unwrap_or_default();
            let value: Value = serde_json::from_slice(&text).unwrap_or_default();
            let mut plugins = value["plugins"].as_array().into_iter().flatten().chain([&value]);
            if plugins.any(|plugin| plugin["type"] == PLUGIN) {
                return Ok(Some(path));
            }
        }
        Ok(None)
    }
}
