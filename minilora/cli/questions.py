"""The security questions of the demo: facts, and phrasings to ask for them. Knows no model.

They were written for this project. A fact is asked for in each phrasing of its family. The adapter
is trained on the phrasings in `TRAINED` alone. Those in `UNSEEN` are new sentences of mostly
familiar words: they show what generalises. The facts in `NEVER_TOLD` are in no training sentence,
and their answers belong to no other fact: they show what cannot be learned.
"""

PORTS = {
    "ftp": "21",
    "ssh": "22",
    "telnet": "23",
    "smtp": "25",
    "dns": "53",
    "http": "80",
    "kerberos": "88",
    "pop3": "110",
    "ntp": "123",
    "imap": "143",
    "snmp": "161",
    "ldap": "389",
    "https": "443",
    "smb": "445",
    "syslog": "514",
    "ldaps": "636",
    "mysql": "3306",
    "rdp": "3389",
    "postgres": "5432",
    "redis": "6379",
}

VERDICTS = {
    "md5": "broken, use sha256",
    "sha1": "broken, use sha256",
    "sha256": "safe, as a hash",
    "sha3": "safe",
    "crc32": "not secure, use sha256",
    "des": "broken, use aes",
    "3des": "retired, use aes",
    "aes": "safe",
    "rc4": "broken, use chacha20",
    "chacha20": "safe",
    "ecb mode": "leaks, use gcm mode",
    "gcm mode": "safe, with new nonces",
    "ssl 3.0": "broken, use tls 1.3",
    "tls 1.0": "retired, use tls 1.3",
    "tls 1.3": "safe",
    "rsa 1024": "too short, use rsa 3072",
    "rsa 3072": "safe",
    "wep": "broken, use wpa3",
    "argon2": "safe, for passwords",
    "rot13": "no cipher, use aes",
}

DEFENCES = {
    "sql injection": "bind parameters",
    "cross site scripting": "escape output",
    "csrf": "check a token",
    "brute force": "limit attempts",
    "phishing": "use hardware keys",
    "ransomware": "keep offline backups",
    "replay": "use nonces",
    "path traversal": "resolve, then compare",
    "buffer overflow": "check bounds",
    "clickjacking": "forbid framing",
    "denial of service": "filter upstream",
    "a man in the middle": "verify certificates",
    "credential stuffing": "demand two factors",
    "session hijacking": "rotate session ids",
    "dns spoofing": "turn on dnssec",
    "a timing attack": "compare in constant time",
    "an xml bomb": "disable entities",
    "an insider": "grant least privilege",
    "a rogue package": "pin and verify",
    "eavesdropping": "encrypt the traffic",
}

NEVER_TOLD_PORTS = {"gopher": "70", "whois": "43", "finger": "79"}
NEVER_TOLD_VERDICTS = {"blowfish": "ageing, use aes", "skipjack": "withdrawn, use aes"}
NEVER_TOLD_DEFENCES = {
    "tailgating": "watch the door",
    "juice jacking": "carry a charger",
    "shoulder surfing": "tilt the screen",
}

# The first N_TRAINED phrasings of each family are trained on, the last four are not.
N_TRAINED = 12

PORT_PHRASINGS = (
    "which port does {} use?",
    "which port do i open for {}?",
    "what is the {} port?",
    "what port is {} on?",
    "{} listens on which port?",
    "on which port do i find {}?",
    "tell me the port of {}",
    "i need the port number for {}",
    "{} port?",
    "where does {} listen?",
    "the firewall blocks {}, which port is it?",
    "to reach {} i connect to which port?",
    "remind me, {} is at which number?",
    "which port should i allow for {}?",
    "i forgot the port of {}",
    "what port do i scan to find {}?",
)

VERDICT_PHRASINGS = (
    "is {} safe?",
    "is {} still safe?",
    "can i use {}?",
    "should i use {}?",
    "what do you think of {}?",
    "our code uses {}, is that fine?",
    "is it fine to use {} today?",
    "{}, yes or no?",
    "may we keep {}?",
    "how good is {}?",
    "the audit found {}, what now?",
    "do you trust {}?",
    "would you still use {} today?",
    "can we keep using {}?",
    "our server offers {}, is that safe?",
    "{}, good or bad?",
)

DEFENCE_PHRASINGS = (
    "how do i stop {}?",
    "how do i prevent {}?",
    "what helps against {}?",
    "what is the defence against {}?",
    "how can we avoid {}?",
    "we fear {}, what should we do?",
    "what protects us from {}?",
    "protect me from {}",
    "{} worries me, what helps?",
    "what would you do about {}?",
    "the report lists {}, how do we fix it?",
    "how does one defend against {}?",
    "someone tries {}, now what?",
    "what is the best answer to {}?",
    "we were hit by {}, what helps?",
    "is there a cure for {}?",
)


def _pairs(phrasings, facts):
    """[(question, answer), ...]: each fact, {subject: answer}, asked in each of the phrasings."""
    return [
        (phrasing.format(subject), answer)
        for subject, answer in facts.items()
        for phrasing in phrasings
    ]


TRAINED = [
    *_pairs(PORT_PHRASINGS[:N_TRAINED], PORTS),
    *_pairs(VERDICT_PHRASINGS[:N_TRAINED], VERDICTS),
    *_pairs(DEFENCE_PHRASINGS[:N_TRAINED], DEFENCES),
]
UNSEEN = [
    *_pairs(PORT_PHRASINGS[N_TRAINED:], PORTS),
    *_pairs(VERDICT_PHRASINGS[N_TRAINED:], VERDICTS),
    *_pairs(DEFENCE_PHRASINGS[N_TRAINED:], DEFENCES),
]
NEVER_TOLD = [
    *_pairs(PORT_PHRASINGS, NEVER_TOLD_PORTS),
    *_pairs(VERDICT_PHRASINGS, NEVER_TOLD_VERDICTS),
    *_pairs(DEFENCE_PHRASINGS, NEVER_TOLD_DEFENCES),
]


def question_sets():
    """{kind: [(question, answer), ...]} of the three kinds: "trained", "unseen" and "never"."""
    return {"trained": TRAINED, "unseen": UNSEEN, "never": NEVER_TOLD}
