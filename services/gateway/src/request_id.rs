//! `x-request-id`: taken from the client where it gave a good one, made where it did not, told in every answer.

/// The header, and the key in gRPC's metadata.
pub(crate) const NAME: &str = "x-request-id";
/// Longest id that a client may give.
const MAX: usize = 128;

/// The id of a request.
pub(crate) fn choose(given: Option<&[u8]>) -> String {
    let good = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.:".contains(byte);
    let given = given.filter(|id| (1..=MAX).contains(&id.len()) && id.iter().all(good));
    match given.and_then(|id| std::str::from_utf8(id).ok()) {
        Some(id) => id.to_owned(),
        None => uuid::Uuid::new_v4().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_ids_are_kept_and_others_replaced() {
        assert_eq!(choose(Some(b"trace-1.a:b_C")), "trace-1.a:b_C");
        for bad in [&b""[..], b"a b", b"a\"b", "é".as_bytes(), &[b'a'; MAX + 1]] {
            assert_eq!(choose(Some(bad)).len(), 36, "{bad:?}");
        }
        assert_ne!(choose(None), choose(None));
    }
}
