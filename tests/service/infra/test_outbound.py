"""Which URLs of clients this server calls, and where it connects to then."""

from __future__ import annotations

import datetime
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpcore2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from app.infra.outbound import RESPONSE_BYTES, Outbound, Unreachable, UrlRefused, is_public
from tests.support.receiver import Receiver, Reply

STRICT = Outbound()
LOCAL = Outbound(private_hosts=["127.0.0.1"], timeout_seconds=5)
PUBLIC = "93.184.216.34"
PRIVATE_NETWORKS = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "224.0.0.0/4",
    "240.0.0.0/4",
]


@st.composite
def private_v4(draw: st.DrawFn) -> ipaddress.IPv4Address:
    network = ipaddress.IPv4Network(draw(st.sampled_from(PRIVATE_NETWORKS)))
    offset = draw(st.integers(0, network.num_addresses - 1))
    return network[offset]


def spellings(address: ipaddress.IPv4Address) -> list[str]:
    """Ways to write an address that some parser or resolver takes for it."""
    number = int(address)
    a, b, c, d = address.packed
    high, low = number >> 16, number & 0xFFFF
    wide = str(address).translate(str.maketrans("0123456789.", "０１２３４５６７８９。"))
    return [
        str(address),
        str(number),
        hex(number),
        hex(number).upper().replace("0X", "0x"),
        f"0{number:o}",
        f"0{a:o}.0{b:o}.0{c:o}.0{d:o}",
        f"0x{a:x}.0x{b:x}.0x{c:x}.0x{d:x}",
        f"{a:04d}.{b:04d}.{c:04d}.{d:04d}",
        f"{a}.{(b << 16) | (c << 8) | d}",
        f"{a}.{b}.{low}",
        f"{a}.0x{b:x}.0{c:o}.{d}",
        f"{address}.",
        f"{address}..",
        wide,
        f"%31{str(address)[1:]}",
        f"[::ffff:{address}]",
        f"[::ffff:{high:x}:{low:x}]",
        f"[::{address}]",
        f"[64:ff9b::{address}]",
        f"[64:ff9b:1::{address}]",
        f"[2002:{high:x}:{low:x}::]",
        f"[0:0:0:0:0:ffff:{address}]",
        f"[fe80::{high:x}:{low:x}%25eth0]",
        f"[fe80::{high:x}:{low:x}%eth0]",
        f"user@{address}",
        f"hooks.example.com@{address}",
        f"hooks.example.com:443@{address}",
        f"{address}:443",
        f"{address}\\@hooks.example.com",
        f"{address}#@hooks.example.com",
    ]


@given(private_v4(), st.data())
def test_no_spelling_of_a_private_address_is_accepted(
    address: ipaddress.IPv4Address, data: st.DataObject
) -> None:
    host = data.draw(st.sampled_from(spellings(address)))
    with pytest.raises(UrlRefused):
        STRICT.check(f"https://{host}/path")


@given(st.ip_addresses(v=4))  # draws special addresses often
def test_what_counts_as_public_is_global_also_by_the_standard_library(address: ipaddress.IPv4Address) -> None:
    if is_public(str(address)):
        assert address.is_global
        assert not any((address.is_multicast, address.is_private, address.is_reserved))


@given(st.one_of(st.ip_addresses(v=6), st.integers(2**125, 2**126 - 1).map(ipaddress.IPv6Address)))
def test_the_same_for_ipv6(address: ipaddress.IPv6Address) -> None:
    if is_public(str(address)):
        assert address.is_global
        assert not any((address.is_multicast, address.is_private, address.is_reserved))
        assert address.ipv4_mapped is None
        assert address.sixtofour is None
        assert address.teredo is None


@given(private_v4(), st.sampled_from(["::ffff:", "64:ff9b::", "64:ff9b:1::", "::"]))
def test_a_private_address_within_an_ipv6_one_is_not_public(
    address: ipaddress.IPv4Address, prefix: str
) -> None:
    assert not is_public(f"{prefix}{address}")


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254",
        "100.100.100.200",
        "192.0.0.192",
        "168.63.129.16",
        "fd00:ec2::254",
        "fe80::1",
        "fe80::1%eth0",
        "::",
        "::1",
        "ff02::1",
        "2001::1",
        "2001:db8::1",
        "2002:7f00:1::",
        "0.0.0.0",
        "255.255.255.255",
        "no address",
        "",
    ],
)
def test_metadata_services_and_special_addresses_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", [PUBLIC, "1.1.1.1", "2606:4700:4700::1111"])
def test_public_addresses_are(address: str) -> None:
    assert is_public(address)


URL_PIECES = st.lists(
    st.sampled_from(
        [*"https:/@.#?%[]\\0x17-_ ", "https://", "http://", "localhost", "example.com", "127.0.0.1", "::1", "xn--",
         "%2f", "%00", ":443", ":80", "0x7f", "。", "①", "\t", "\n", "a", "EXAMPLE", ".."]
    ),
    max_size=12,
).map("".join)  # fmt: skip


@given(st.one_of(URL_PIECES.map("https://".__add__), URL_PIECES, st.text(max_size=60)))
def test_whatever_is_accepted_is_one_public_https_host_for_every_parser(text: str) -> None:
    try:
        url = STRICT.check(text)
    except UrlRefused:
        return
    assert url.scheme == "https"
    assert url.port in (None, 443)
    host = url.raw_host.decode()
    other = urlsplit(text)
    assert other.hostname == host
    assert (other.username, other.password) == (None, None)
    try:
        parsed = socket.inet_ntoa(socket.inet_aton(host))  # takes every spelling that the C library does
    except OSError:
        assert "." in host or ":" in host
    else:
        assert parsed == host
        assert is_public(parsed)


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.example.com/orthokv?token=1",
        "https://hooks.example.com:443/",
        "https://HOOKS.example.com",
        "https://xn--bcher-kva.example/",
        f"https://{PUBLIC}/",
        "https://[2606:4700:4700::1111]/",
    ],
)
def test_public_https_urls_are_accepted(url: str) -> None:
    STRICT.check(url)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://hooks.example.com/", "https"),
        ("ftp://hooks.example.com/", "https"),
        ("HTTPS+unix://hooks.example.com/", "https"),
        ("hooks.example.com", "https"),
        ("https://hooks.example.com:8443/", "port 443"),
        ("https://hooks.example.com:0443443/", "URL|port"),
        ("https://localhost/", "public host"),
        ("https://intranet/", "public host"),
        ("https://hooks.example.com./", "public host"),
        ("https://hooks..example.com/", "public host|not a URL"),
        ("https://-hooks.example.com/", "public host|not a URL"),
        ("https://1.2.3/", "public host"),
        ("https://0x7f000001/", "public host"),
        ("https://127.1/", "public host"),
        ("https://user:secret@hooks.example.com/", "user"),
        ("https://@hooks.example.com/", "user"),
        ("https://hooks.example.com/#part", "fragment"),
        ("https://bücher.example/", "ASCII"),
        ("https://hooks.example.com/ x", "ASCII"),
        ("https://hooks.example.com\\@127.0.0.1/", "ASCII"),
        ("https://hooks%2eexample.com/", "public host|not a URL"),
        ("https://127.0.0.1/", "public address"),
        ("https://[::1]/", "public address"),
        ("https:///path", "public host|not a URL"),
        ("", "ASCII"),
        ("https://hooks.example.com/" + "x" * 2048, "ASCII"),
    ],
)
def test_other_urls_are_refused_for_a_reason_that_does_not_repeat_them(url: str, reason: str) -> None:
    with pytest.raises(UrlRefused, match=reason) as refusal:
        STRICT.check(url)
    assert "secret" not in str(refusal.value)


class TestConnection:
    @pytest.fixture
    def connected(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Addresses that would have been connected to."""
        addresses: list[str] = []

        def connect(_self: object, host: str, *_: object) -> None:
            addresses.append(host)
            raise httpcore2.ConnectError("not in a test")

        monkeypatch.setattr(httpcore2.SyncBackend, "connect_tcp", connect)
        return addresses

    def test_goes_to_the_address_that_was_checked_whatever_the_name_says_next(
        self, connected: list[str]
    ) -> None:
        answers = iter([[PUBLIC], ["127.0.0.1"], ["127.0.0.1"]])
        rebinding = Outbound(resolve=lambda host, port: next(answers))
        with pytest.raises(Unreachable):
            rebinding.post("https://rebinding.example.com/", content=b"{}", headers={})
        assert connected == [PUBLIC]
        with pytest.raises(UrlRefused):
            rebinding.post("https://rebinding.example.com/", content=b"{}", headers={})
        assert connected == [PUBLIC]

    @pytest.mark.parametrize(
        "addresses",
        [
            ["10.0.0.1"],
            [PUBLIC, "10.0.0.1"],
            [PUBLIC, "::ffff:10.0.0.1"],
            ["fe80::1%2"],
            ["64:ff9b::a00:1"],
            [],
        ],
        ids=str,
    )
    def test_is_not_made_when_any_address_is_not_public(
        self, connected: list[str], addresses: list[str]
    ) -> None:
        outbound = Outbound(resolve=lambda host, port: addresses)
        with pytest.raises(UrlRefused, match="no public address"):
            outbound.post("https://mixed.example.com/", content=b"{}", headers={})
        assert connected == []

    def test_a_name_that_does_not_exist_is_told_as_a_private_one_is(self) -> None:
        def unknown(host: str, port: int) -> list[str]:
            raise socket.gaierror("unknown")

        with pytest.raises(UrlRefused, match="no public address"):
            Outbound(resolve=unknown).post("https://none.example.com/", content=b"{}", headers={})

    @pytest.mark.parametrize(
        "address", ["169.254.169.254", "fe80::1", "224.0.0.1", "0.0.0.0", "168.63.129.16"]
    )
    def test_a_private_host_that_the_operator_names_may_not_be_a_metadata_service(
        self, connected: list[str], address: str
    ) -> None:
        outbound = Outbound(private_hosts=["inside"], resolve=lambda host, port: [address])
        with pytest.raises(UrlRefused, match="no public address"):
            outbound.post("http://inside:8080/", content=b"{}", headers={})
        assert connected == []

    def test_another_address_of_the_name_is_tried_when_one_does_not_answer(self) -> None:
        with Receiver() as receiver:
            outbound = Outbound(
                private_hosts=["inside"],
                resolve=lambda host, port: ["127.0.0.2", "127.0.0.1"],
                timeout_seconds=5,
            )
            answer = outbound.post(f"http://inside:{receiver.port}/", content=b"{}", headers={})
        assert answer.status == 200
        assert receiver.requests[0].headers["host"] == f"inside:{receiver.port}"


class TestRequest:
    @pytest.fixture
    def receiver(self) -> Iterator[Receiver]:
        with Receiver() as receiver:
            yield receiver

    def test_a_redirect_is_an_answer_and_is_not_followed(self, receiver: Receiver) -> None:
        receiver.replies = [Reply(302, {"Location": f"{receiver.url}/elsewhere"})]
        assert LOCAL.post(receiver.url, content=b"{}", headers={}).status == 302
        assert [request.path for request in receiver.requests] == ["/hook"]

    def test_no_proxy_of_the_environment_is_used(
        self, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with Receiver() as proxy:
            for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
                monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
            monkeypatch.delenv("no_proxy", raising=False)
            outbound = Outbound(private_hosts=["127.0.0.1"], timeout_seconds=5)
            assert outbound.post(receiver.url, content=b"{}", headers={}).status == 200
            assert (len(receiver.requests), len(proxy.requests)) == (1, 0)

    def test_a_response_is_cut(self, receiver: Receiver) -> None:
        receiver.default = Reply(body=b"x" * 20_000_000)
        assert LOCAL.post(receiver.url, content=b"{}", headers={}).body == b"x" * RESPONSE_BYTES

    def test_a_receiver_that_drips_holds_nobody(self, receiver: Receiver) -> None:
        receiver.default = Reply(drip_seconds=0.05)
        began = time.monotonic()
        with pytest.raises(Unreachable, match="in time"):
            Outbound(private_hosts=["127.0.0.1"], timeout_seconds=0.5).post(
                receiver.url, content=b"{}", headers={}
            )
        assert time.monotonic() - began < 3

    def test_what_is_no_http_is_unreachable(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            listening.settimeout(10)

            def answer() -> None:
                connection, _ = listening.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(b"SSH-2.0-OpenSSH\r\n\r\n")

            thread = threading.Thread(target=answer)
            thread.start()
            with pytest.raises(Unreachable, match="not HTTP"):
                LOCAL.post(f"http://127.0.0.1:{listening.getsockname()[1]}/", content=b"{}", headers={})
            thread.join()


class TestTls:
    @pytest.fixture
    def tls(self, tmp_path: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        """Contexts of a server called hooks.example.com and of a client that trusts it."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "hooks.example.com")])
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("hooks.example.com")]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        pem = tmp_path / "server.pem"
        pem.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            + certificate.public_bytes(serialization.Encoding.PEM)
        )
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(pem)
        return server, ssl.create_default_context(cafile=str(pem))

    def test_the_name_stays_in_sni_certificate_and_host_while_the_address_is_dialled(
        self, tls: tuple[ssl.SSLContext, ssl.SSLContext]
    ) -> None:
        server, client = tls
        asked: list[str | None] = []
        server.sni_callback = lambda _socket, name, _context: asked.append(name)
        with Receiver(server) as receiver:
            outbound = Outbound(
                private_hosts=["hooks.example.com"],
                resolve=lambda host, port: ["127.0.0.1"],
                ssl_context=client,
                timeout_seconds=5,
            )
            url = f"https://hooks.example.com:{receiver.port}/hook"
            assert outbound.post(url, content=b"{}", headers={}).status == 200
        assert asked == ["hooks.example.com"]
        assert receiver.requests[0].headers["host"] == f"hooks.example.com:{receiver.port}"

    def test_a_certificate_of_another_name_is_refused(
        self, tls: tuple[ssl.SSLContext, ssl.SSLContext]
    ) -> None:
        server, client = tls
        with Receiver(server) as receiver:
            outbound = Outbound(
                private_hosts=["other.example.com"],
                resolve=lambda host, port: ["127.0.0.1"],
                ssl_context=client,
                timeout_seconds=5,
            )
            with pytest.raises(Unreachable, match="certificate"):
                outbound.post(f"https://other.example.com:{receiver.port}/", content=b"{}", headers={})
        assert receiver.requests == []


def test_the_list_of_spellings_is_one_of_spellings() -> None:
    """The C library takes many of them for the address: they are an attack, not noise."""
    address = ipaddress.IPv4Address("127.0.0.1")
    taken = 0
    for text in spellings(address):
        try:
            taken += socket.inet_aton(re.sub(r":\d+$", "", text)) == address.packed
        except OSError:
            continue
    assert taken >= 9


@given(st.integers(1 << 24, (10 << 24) - 1).map(ipaddress.IPv4Address))
def test_a_public_address_is_accepted_in_digits_only(address: ipaddress.IPv4Address) -> None:
    STRICT.check(f"https://{address}/")
    with pytest.raises(UrlRefused):
        STRICT.check(f"https://{int(address)}/")
