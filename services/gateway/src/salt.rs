//! The secret of tenants' salts that the gateways of a cluster share where none is configured.
use bytes::Bytes;
use moesaic_types::Result;
use moesaic_types::boundary::Metadata;

/// Where it stands.
const KEY: &str = "gateway/salt-secret";

/// Makes the secret that stands in the metadata, and the answer, one: `own` is written where there is none.
///
/// # Errors
/// What the metadata say.
pub(crate) async fn agree(metadata: &dyn Metadata, own: &[u8]) -> Result<Bytes> {
    loop {
        if let Some((theirs, _)) = metadata.get(KEY).await? {
            return Ok(theirs);
        }
        let own = Bytes::copy_from_slice(own);
        if metadata.compare_and_set(KEY, None, own.clone(), None).await?.is_some() {
            return Ok(own);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moesaic_transport::MemoryMetadata;

    #[tokio::test]
    async fn the_first_secret_is_everyones_and_is_put_back_where_it_was_lost() {
        let metadata = MemoryMetadata::default();
        assert_eq!(agree(&metadata, b"first").await, Ok(Bytes::from("first")));
        assert_eq!(agree(&metadata, b"second").await, Ok(Bytes::from("first")));
        let (_, version) = metadata.get(KEY).await.unwrap().unwrap();
        assert_eq!(metadata.remove(KEY, version).await, Ok(true));
        assert_eq!(agree(&metadata, b"first").await, Ok(Bytes::from("first")));
    }
}
