//! The secret of tenants' salts, beside the blocks that kv-stores keep on disk: with another one they are not found.
use crate::config::Config;
use anyhow::{Context, Result, bail};
use moesaic_config::Secret;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

/// Its name in the folder of the kv-stores' folders.
const FILE: &str = "salt-secret";

/// The fewest bytes that one has; fewer are what was left of one.
const FEWEST: usize = 32;

/// Keeps the secret in `kv_store.disk_folder` where blocks are kept there and the settings name none, and puts it into the
/// settings.
///
/// # Errors
/// When the file cannot be read or written.
pub fn keep(config: &mut Config, kv_stores: u16) -> Result<()> {
    let is_set = !config.gateway.salt_secret.expose().is_empty() || config.gateway.share_prefixes;
    let Some(folder) = config.kv_store.disk_folder.as_deref().filter(|_| !is_set && kv_stores > 0) else {
        return Ok(());
    };
    let path = folder.join(FILE);
    let named = || format!("keep the secret of tenants' salts in {}, or set gateway.salt_secret", path.display());
    config.gateway.salt_secret = Secret::new(read_or_make(folder, &path).with_context(named)?);
    Ok(())
}

fn read_or_make(folder: &Path, path: &Path) -> Result<String> {
    match std::fs::read_to_string(path) {
        Ok(text) if text.trim().len() >= FEWEST => return Ok(text.trim().to_owned()),
        Ok(_) => bail!("it is shorter than {FEWEST} bytes; remove it to have another made"),
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error.into()),
    }
    let secret = [uuid::Uuid::new_v4(), uuid::Uuid::new_v4()].map(|random| random.simple().to_string()).concat();
    DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    // it has its name once it is whole
    let unnamed = folder.join(format!(".{FILE}-{}", &secret[..8]));
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unnamed)?;
    writeln!(file, "{secret}")?;
    file.sync_all()?;
    std::fs::rename(&unnamed, path)?;
    File::open(folder)?.sync_all()?;
    Ok(secret)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn it_is_made_once_and_nobody_else_may_read_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let place = folder.path().join("deep/blocks");
        let mut config = Config::default();
        config.kv_store.disk_folder = Some(place.clone());
        let secret = |config: &Config, kv_stores| {
            let mut config = config.clone();
            keep(&mut config, kv_stores).expect("kept");
            config.gateway.salt_secret.expose().to_owned()
        };
        assert_eq!(secret(&config, 0), "", "no blocks are kept");
        let made = secret(&config, 1);
        assert_eq!((made.len(), secret(&config, 2)), (64, made.clone()));
        let file = place.join(FILE);
        assert_eq!(file.metadata().expect("it is there").mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(&place).expect("a folder").count(), 1);

        config.gateway.salt_secret = Secret::new("mine");
        assert_eq!(secret(&config, 1), "mine");
        config.gateway.salt_secret = Secret::default();
        std::fs::write(&file, "cut").expect("written");
        let error = format!("{:#}", keep(&mut config, 1).expect_err("it was cut"));
        assert!(error.contains("salt-secret") && error.contains("remove it"), "{error}");
        config.gateway.share_prefixes = true;
        assert_eq!(secret(&config, 1), "");
    }
}
