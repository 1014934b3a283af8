"""Clean documents of three domains (English tales, Chinese poems, Python code) from folders of texts.

Every domain becomes a list of `Document`s: title, author or module, and a body in a constant, simple layout.
About 2 % of the documents of each domain, chosen by a hash of their title, are held out for perplexity.
"""

from __future__ import annotations

import ast
import hashlib
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT, THINK, END_THINK = "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"
DOMAINS = ("english", "chinese", "code")
SYSTEM = "You are a helpful assistant who tells tales, writes poems and Python code."


@dataclass
class Document:
    """One tale, poem or module; `pieces` are the passages or functions that chat answers may quote."""

    domain: str
    title: str
    author: str
    body: str
    pieces: list[tuple[str, str]] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The document as plain training text."""
        if self.domain == "chinese":
            return f"{self.title}\n{self.author}\n{self.body}"
        return f"# {self.title}\n{self.body}" if self.domain == "code" else f"{self.title}\n\n{self.body}"

    @property
    def held_out(self) -> bool:
        """True for the documents kept for evaluation."""
        key = f"{self.domain}/{self.title}/{self.author}"
        return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % 1000 < 18


# --------------------------------------------------------------------------------------------- English

_QUOTES = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "—": "--", "\u00a0": " ", "_": None})
_ROMAN = re.compile(r"^(?:CHAPTER|ADVENTURE|BOOK|PART)?\s*[IVXLC\d]+[.:]?\s*$", re.I)
_SKIP = re.compile(
    r"^(contents|preface|introduction|by|to|dedication|footnotes?|notes?|the end|illustrations)\b", re.I
)


def _paragraphs(raw: str) -> list[tuple[int, str, bool]]:
    """Re-flow hard-wrapped text: (blank lines before, paragraph on one line, was it a single line)."""
    result: list[tuple[int, str, bool]] = []
    blanks, lines = 0, list[str]()
    for line in [*raw.splitlines(), ""]:
        if line.strip():
            lines.append(line.rstrip())
            continue
        if lines:
            verse = len(lines) > 1 and all(item.startswith("    ") for item in lines)
            text = ("\n" if verse else " ").join(item.strip() for item in lines)
            text = re.sub(r"\[Illustration[^\]]*\]|\[Footnote[^\]]*\]|\[\d+\]", "", text)
            text = re.sub(r"[ \t]+", " ", text.translate(_QUOTES)).strip()
            if text and not re.fullmatch(r"[\s*·.=~-]+", text):
                result.append((blanks, text, len(lines) == 1))
            blanks, lines = 0, []
        blanks += 1
    return result


def _tidy_title(text: str) -> str:
    text = re.sub(
        r"^(?:CHAPTER|ADVENTURE)?\s*[IVXLC\d]+[.:]\s*|^(?:CHAPTER|ADVENTURE)\s+[IVXLC\d]+\s+", "", text
    )
    text = re.sub(r"\s*\[.*?\]|\(\d+\)", "", text).strip(" .*")
    if text.isupper():
        small = {"Of", "The", "And", "A", "An", "In", "To", "With", "On", "For", "Who", "From", "How", "At"}
        words = [
            word if word not in small else word.lower() for word in (w.capitalize() for w in text.split())
        ]
        text = " ".join(words)
    return text[:1].upper() + text[1:]


def english_documents(folder: Path) -> list[Document]:
    """Tales and chapters from plain-text books (Project Gutenberg layout, licence text removed)."""
    documents: list[Document] = []
    for path in sorted(folder.glob("*.txt")):
        book = re.sub(r"-s-", "'s ", path.stem).replace("-", " ").title().replace("'S", "'s")
        sections: list[tuple[str, list[str]]] = [("", [])]
        for blanks, text, single in _paragraphs(path.read_text(encoding="utf-8")):
            heading = single and len(text) < 80 and not re.search(r"[,;:!?\"'-]$", text)
            if heading and _ROMAN.match(text):
                continue
            if heading and (blanks >= 3 or (text.isupper() and blanks >= 1 and len(text) > 6)):
                sections.append((_tidy_title(text), []))
            else:
                sections[-1][1].append(text)
        for title, parts in sections:
            body = "\n\n".join(parts)
            if len(body) < 900 or not title or _SKIP.match(title):
                continue
            document = Document("english", title, book, body)
            start = 0
            while start < len(parts):  # passages of up to about 1,100 characters, at paragraph borders
                end, size = start, 0
                while end < len(parts) and (size + len(parts[end]) < 1100 or end == start):
                    size += len(parts[end])
                    end += 1
                if 250 < size < 1500:
                    document.pieces.append((title if start == 0 else "", "\n\n".join(parts[start:end])))
                start = end
            documents.append(document)
    return documents


# --------------------------------------------------------------------------------------------- Chinese


def chinese_documents(folder: Path) -> list[Document]:
    """Poems separated by blank lines: title (or tune), author, lines."""
    documents: list[Document] = []
    for path in sorted(folder.glob("*.txt")):
        for block in path.read_text(encoding="utf-8").split("\n\n"):
            lines = [
                re.sub(r"[（(][^）)]*[）)]|[\[\]〖〗{}<>]|\s+", "", line)
                for line in block.strip().splitlines()
            ]
            lines = [line for line in lines if line]
            if (
                len(lines) < 3
                or any(mark in block for mark in "□■？？…"[:2])
                or not 16 <= len("".join(lines[2:])) <= 900
            ):
                continue
            body = "\n".join(lines[2:])
            document = Document("chinese", lines[0], lines[1], body)
            if len(body) <= 260:
                document.pieces.append(("song" if "song" in path.stem else "tang", body))
            documents.append(document)
    return documents


# ------------------------------------------------------------------------------------------------ code

_EXCLUDED = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "encodings",
    "pydoc_data",
}
_EXCLUDED |= {"lib-dynload", "ensurepip", "turtledemo", "fixtures", "__phello__"}
_RULE = re.compile(r"^\s*#\s*[-=*#~_+ ]{5,}\s*$")


def code_documents(folder: Path) -> list[Document]:
    """Modules of a Python source tree without tests, generated tables and rule lines."""
    documents: list[Document] = []
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        if _EXCLUDED & set(relative.parts) or relative.parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue
        numeric = sum(char.isdigit() or char in "\\\"'," for char in source)
        if (
            len(source) < 300
            or numeric > 0.25 * len(source)
            or str(relative) in {"html/entities.py", "this.py"}
        ):
            continue
        lines = [line.rstrip() for line in source.expandtabs(4).splitlines()]
        kept = [line for line in lines if not _RULE.match(line) and len(line) < 160]
        body = re.sub(r"\n{4,}", "\n\n\n", "\n".join(kept)).strip()
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        document = Document("code", module, "", body)
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.end_lineno is not None:
                first = min([node.lineno, *[item.lineno for item in node.decorator_list]])
                piece = "\n".join(lines[first - 1 : node.end_lineno])
                if 80 < len(piece) < 1300:
                    document.pieces.append((node.name, piece))
        documents.append(document)
    return documents


# ------------------------------------------------------------------------------------------------ chat

_ENGLISH_ASKS = [
    "Tell me a tale about {0}.",
    "Please tell me the story of {0}.",
    "I would like to hear about {0}.",
    "Can you tell me a fairy tale about {0}?",
    'Write a story called "{1}".',
    'How does "{1}" begin?',
    "讲一个关于 {1} 的故事。",
]
_ENGLISH_PLAIN = [
    "Tell me a tale.",
    "Tell me a story.",
    "Please tell me a fairy tale.",
    "Once more, a story please.",
    "I cannot sleep. Tell me a story.",
    "Tell me something from {2}.",
    "讲一个故事。",
]
_ENGLISH_THOUGHTS = [
    "The user wants a tale{0}. I will tell it in simple words.",
    "I am asked for a story{0}. I will begin at once.",
    "A tale{0} is wanted. Let me tell it well.",
]
_POEM_ASKS = [
    "写一首{author}的{kind}。",
    "请写一首{author}的{kind}。",
    "我想读{author}的{kind}。",
    "以《{title}》为题写一首{kind}。",
    "请写《{title}》。",
    "写一首{kind}。",
    "Write a Chinese poem by {author}.",
    "Please write the poem {title}.",
    "Write a poem in the style of {author}.",
]
_POEM_THOUGHTS = [
    "用户想要一首{kind}。我来写{author}的《{title}》。",
    "这里要一首{kind}，作者是{author}，题目是《{title}》。",
    "The user wants a Chinese poem. I will write {title} by {author}.",
]
_CODE_ASKS = [
    "Write the Python {what} {name}.",
    "Please write {name} from the module {module}.",
    "Show me the Python {what} {name} of {module}.",
    "How is {name} in {module} written?",
    "Write a Python {what} called {name}.",
    "Give me some Python code from {module}.",
    "用 Python 写{zh} {name}。",
]
_CODE_THOUGHTS = [
    "The user wants the Python {what} {name}. I will write it as in the module {module}.",
    "I am asked for Python code: {name} of {module}. Here it is.",
]


def chat_text(question: str, thought: str, answer: str, system: str = "") -> str:
    """A chat document in DeepSeek's layout, without the leading bos and the trailing eos."""
    return f"{system}{USER}{question}{ASSISTANT}{THINK}\n{thought}\n{END_THINK}\n\n{answer}"


def chat_documents(documents: list[Document], rng: random.Random, characters: int) -> list[str]:
    """Chat documents of about `characters` characters, synthesised from pieces of the given documents."""
    pool = [(document, label, piece) for document in documents for label, piece in document.pieces]
    rng.shuffle(pool)
    result: list[str] = []
    total = 0
    for document, label, piece in pool:
        if total >= characters:
            break
        if document.domain == "english":
            if label:
                topic = document.title[:1].lower() + document.title[1:]
                ask, about = rng.choice(_ENGLISH_ASKS).format(topic, document.title), f" about {topic}"
            else:
                ask, about = rng.choice(_ENGLISH_PLAIN).format("", "", document.author), ""
            thought, answer = rng.choice(_ENGLISH_THOUGHTS).format(about), piece
        elif document.domain == "chinese":
            names = {
                "author": document.author,
                "title": document.title,
                "kind": "词" if label == "song" else "诗",
            }
            if label == "song" and rng.random() < 0.25:
                ask = f"用词牌《{document.title}》写一首词。"
            else:
                ask = rng.choice(_POEM_ASKS).format(**names)
            thought = rng.choice(_POEM_THOUGHTS).format(**names)
            answer = f"{document.title}\n{document.author}\n{piece}"
        else:
            what = "class" if piece.startswith("class ") else "function"
            names = {
                "name": label,
                "module": document.title,
                "what": what,
                "zh": "类" if what == "class" else "函数",
            }
            ask = rng.choice(_CODE_ASKS).format(**names)
            thought, answer = rng.choice(_CODE_THOUGHTS).format(**names), f"```python\n{piece}\n```"
        result.append(chat_text(ask, thought, answer, SYSTEM if rng.random() < 0.1 else ""))
        total += len(result[-1])
    return result


def load_domain(domain: str, folder: Path) -> list[Document]:
    """All documents of one domain."""
    reader = {"english": english_documents, "chinese": chinese_documents, "code": code_documents}[domain]
    documents = reader(folder)
    if not documents:
        raise SystemExit(f"no usable {domain} texts in {folder}")
    return documents
