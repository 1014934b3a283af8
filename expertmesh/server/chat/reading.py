"""One answer in a conversation as it grows: outputs of the engine to blocks."""

import uuid
from dataclasses import dataclass

from expertmesh.request import Output
from expertmesh.server.chat.parser import Begin, Event, Kind, Parser, Piece


@dataclass
class Block:
    """What has come of a block. id: of a call, the model's own or a new one."""

    kind: Kind
    name: str
    id: str
    text: str = ""


class Reading:
    """Blocks of an answer, in their order."""

    def __init__(self, parser: Parser) -> None:
        self._parser, self._length = parser, 0
        self.blocks: list[Block] = []

    def more(self, output: Output) -> list[tuple[int, Event]]:
        """What is new in the output since the one before it, each event with the number of its block."""
        events = self._parser.push(output.text[self._length :])
        self._length = len(output.text)
        if output.finished:
            events += self._parser.finish()
        found = []
        for event in events:
            if isinstance(event, Begin):
                call_id = event.id or f"call_{uuid.uuid4().hex[:24]}"
                self.blocks.append(Block(event.kind, event.name, call_id if event.kind == "call" else ""))
            elif isinstance(event, Piece):
                self.blocks[-1].text += event.text
            found.append((len(self.blocks) - 1, event))
        return found

    def text(self, kind: Kind) -> str:
        """All text of this kind."""
        return "".join(block.text for block in self.blocks if block.kind == kind)

    @property
    def calls(self) -> list[Block]:
        return [block for block in self.blocks if block.kind == "call"]
