//! Whether a server serves, and whether it is ours: the port may be another's.
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(1);

fn connect(port: u16) -> Result<BufReader<TcpStream>, String> {
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let stream = TcpStream::connect_timeout(&address, PATIENCE).map_err(|error| format!("connect: {error}"))?;
    stream.set_read_timeout(Some(PATIENCE)).map_err(|error| error.to_string())?;
    Ok(BufReader::new(stream))
}

fn send(stream: &mut BufReader<TcpStream>, text: &str) -> Result<(), String> {
    stream.get_mut().write_all(text.as_bytes()).map_err(|error| format!("write: {error}"))
}

fn line(stream: &mut BufReader<TcpStream>) -> Result<String, String> {
    let mut line = String::new();
    stream.read_line(&mut line).map_err(|error| format!("read: {error}"))?;
    Ok(line.trim_end().to_owned())
}

/// Redis answers a ping once it has read its file, and says its process id.
pub fn redis(port: u16, process: u32) -> Result<(), String> {
    let mut stream = connect(port)?;
    send(&mut stream, "PING\r\nINFO server\r\n")?;
    let pong = line(&mut stream)?;
    if pong != "+PONG" {
        return Err(format!("the ping's answer is {pong:?}"));
    }
    let head = line(&mut stream)?;
    let length = head.strip_prefix('$').and_then(|length| length.parse().ok());
    let mut info = vec![0; length.ok_or_else(|| format!("INFO's answer is {head:?}"))?];
    stream.read_exact(&mut info).map_err(|error| format!("read: {error}"))?;
    let own = format!("process_id:{process}");
    let is_ours = String::from_utf8_lossy(&info).lines().any(|line| line == own);
    is_ours.then_some(()).ok_or_else(|| "another Redis has the port".to_owned())
}

/// NATS says its name, and whether it has JetStream.
pub fn nats(port: u16, name: &str) -> Result<(), String> {
    let mut stream = connect(port)?;
    let greeting = line(&mut stream)?;
    let info = greeting.strip_prefix("INFO ").ok_or_else(|| format!("the greeting is {greeting:?}"))?;
    let info: serde_json::Value = serde_json::from_str(info).map_err(|error| format!("INFO: {error}"))?;
    if info["server_name"] != name {
        return Err("another NATS server has the port".to_owned());
    }
    if info["jetstream"] != true {
        return Err("JetStream is off".to_owned());
    }
    send(&mut stream, "CONNECT {\"verbose\":false}\r\nPING\r\n")?;
    let pong = line(&mut stream)?;
    (pong == "PONG").then_some(()).ok_or_else(|| format!("the ping's answer is {pong:?}"))
}
