//! Where a server is: its address, how it is reached, and what it must be told with every request.
use anyhow::{Context, Result, bail, ensure};
use hyper::Uri;
use hyper::header::HeaderValue;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

/// Under which an OpenAI-compatible server has its API.
const BASE: &str = "/v1";

/// A server of the OpenAI API, or any HTTP/1.1 server.
#[derive(Clone)]
pub struct Origin {
    host: String,
    port: u16,
    authority: String,
    base: String,
    tls: Option<Arc<ClientConfig>>,
    authorization: Option<HeaderValue>,
}

impl std::fmt::Debug for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // the key stays out of logs
        f.debug_struct("Origin").field("authority", &self.authority).field("base", &self.base).finish_non_exhaustive()
    }
}

impl From<SocketAddr> for Origin {
    fn from(address: SocketAddr) -> Self {
        Self {
            host: address.ip().to_string(),
            port: address.port(),
            authority: address.to_string(),
            base: BASE.into(),
            tls: None,
            authorization: None,
        }
    }
}

/// What a connection's bytes go through.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

impl Origin {
    /// Reads `http://host:port`, `https://host` or either with a path, under which `/v1/completions` is: `/v1` is added
    /// where the path does not end with it.
    ///
    /// # Errors
    /// When it is no such URL, or the system's certificates cannot be read for https.
    pub fn parse(url: &str) -> Result<Self> {
        let uri: Uri = url.parse().ok().filter(|uri: &Uri| uri.host().is_some()).with_context(|| {
            format!("'{url}' is no URL of a server; write http://host:port or https://host, with a path if it has one")
        })?;
        ensure!(uri.query().is_none(), "'{url}' has a query; a server's URL has none");
        let authority = uri.authority().context("a URL with a host has an authority")?;
        ensure!(!authority.as_str().contains('@'), "'{url}' has a user's name; give the key by --api-key-env");
        let (tls, usual) = match uri.scheme_str() {
            Some("http") => (None, 80),
            Some("https") => (Some(Arc::new(tls()?)), 443),
            _ => bail!("'{url}' is neither of http nor of https"),
        };
        let path = uri.path().trim_end_matches('/');
        let base = if path.ends_with(BASE) { path.to_owned() } else { format!("{path}{BASE}") };
        Ok(Self {
            host: authority.host().trim_matches(['[', ']']).to_owned(),
            port: authority.port_u16().unwrap_or(usual),
            authority: authority.to_string(),
            base,
            tls,
            authorization: None,
        })
    }

    /// The same with a key that goes with each request.
    ///
    /// # Errors
    /// When the key cannot stand in a header.
    pub fn with_key(mut self, key: &str) -> Result<Self> {
        let mut value = HeaderValue::from_str(&format!("Bearer {key}"))
            .ok()
            .context("the API key has characters that no header can have")?;
        value.set_sensitive(true);
        self.authorization = Some(value);
        Ok(self)
    }

    /// Host and port as a request names them.
    pub fn authority(&self) -> &str {
        &self.authority
    }

    /// The path of something under the API.
    pub fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.base)
    }

    pub(crate) fn authorization(&self) -> Option<&HeaderValue> {
        self.authorization.as_ref()
    }

    pub(crate) async fn connect(&self) -> Result<Box<dyn Stream>> {
        let tcp = TcpStream::connect((self.host.as_str(), self.port)).await;
        let tcp = tcp.with_context(|| format!("connect to {}", self.authority))?;
        tcp.set_nodelay(true)?;
        let Some(tls) = &self.tls else { return Ok(Box::new(tcp)) };
        let name = ServerName::try_from(self.host.clone())?;
        let stream = TlsConnector::from(Arc::clone(tls)).connect(name, tcp).await;
        Ok(Box::new(stream.with_context(|| format!("agree on TLS with {}", self.authority))?))
    }
}

fn tls() -> Result<ClientConfig> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    // one that cannot be read is no reason not to use the others
    let (added, _) = roots.add_parsable_certificates(found.certs);
    ensure!(added > 0, "https: this system has no certificates of authorities");
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    #[test]
    fn urls_say_where_the_api_is() {
        let cases = [
            ("http://127.0.0.1:8000", "127.0.0.1", 8000, "/v1/completions"),
            ("http://127.0.0.1:8000/v1/", "127.0.0.1", 8000, "/v1/completions"),
            ("http://models.local/llama/v1", "models.local", 80, "/llama/v1/completions"),
            ("http://[::1]:9/", "::1", 9, "/v1/completions"),
        ];
        for (url, host, port, path) in cases {
            let origin = Origin::parse(url).unwrap();
            assert_eq!((origin.host.as_str(), origin.port, origin.path("completions").as_str()), (host, port, path));
        }
        for wrong in ["", "127.0.0.1:8000", "ftp://host", "http://user@host", "http://host?x=1", "/v1"] {
            assert!(Origin::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_key_goes_with_requests_and_into_no_log() {
        let origin = Origin::parse("http://h").unwrap().with_key("sk-secret").unwrap();
        assert_eq!(origin.authorization().unwrap(), "Bearer sk-secret");
        assert!(!format!("{origin:?} {:?}", origin.authorization()).contains("sk-secret"));
        assert!(origin.with_key("a\nb").is_err());
    }
}
