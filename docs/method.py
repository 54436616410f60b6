"""Draw docs/method.svg, the figure of the README:  python docs/method.py"""

from pathlib import Path

W, H = 900, 330
BOX = '<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="6" fill="{fill}" stroke="#333"/>'
TEXT = '<text x="{x}" y="{y}" text-anchor="middle" font-size="{size}" fill="#111">{text}</text>'
LINE = '<path d="{d}" fill="none" stroke="#333" stroke-width="1.5" marker-end="url(#tip)"{dash}/>'


def box(x, y, w, h, fill, *lines):
    """A box with one to three lines of text: the first large, the others small."""
    parts = [BOX.format(x=x, y=y, w=w, h=h, fill=fill)]
    top = y + h / 2 - 8 * (len(lines) - 1) + 5
    for i, line in enumerate(lines):
        size = 14 if i == 0 else 11
        parts.append(TEXT.format(x=x + w / 2, y=top + 16 * i, size=size, text=line))
    return "\n".join(parts)


def arrow(d, dashed=False):
    return LINE.format(d=d, dash=' stroke-dasharray="5 4"' if dashed else "")


def figure() -> str:
    teachers = ("HuBERT", "RobustHuBERT", "WavLM")
    parts = [box(20, 215, 110, 50, "#f4f4f4", "waveforms", "16 kHz")]
    for i, name in enumerate(teachers):
        y = 20 + 50 * i
        parts.append(box(190, y, 140, 40, "#dce9f7", name, "frozen, eval mode"))
        parts.append(arrow(f"M130,232 C160,232 160,{y + 20} 188,{y + 20}"))
        parts.append(arrow(f"M330,{y + 20} L398,{y + 20}"))
    parts += [
        TEXT.format(x=364, y=14, size=11, text="layers 4, 8, 12"),
        box(400, 20, 150, 140, "#fdf0d5", "aggregation", "separate, average,", "or concat"),
        arrow("M550,90 L638,90"),
        TEXT.format(x=594, y=82, size=11, text="targets"),
        box(190, 215, 260, 50, "#e3f4e1", "student", "conv extractor + 2 transformer layers"),
        arrow("M130,240 L188,240"),
        box(490, 215, 150, 50, "#f7e1ec", "heads", "a set for each target"),
        arrow("M450,240 L488,240"),
        arrow("M640,240 C720,240 745,200 752,132"),
        TEXT.format(x=785, y=195, size=11, text="predictions"),
        box(640, 50, 230, 80, "#eeeeee", "loss", "L1 + λ · (−log σ cos)", "over valid frames"),
        arrow("M240,162 L240,213", dashed=True),
        TEXT.format(x=308, y=192, size=11, text="first weights of one"),
        arrow("M320,265 L320,292"),
        TEXT.format(x=320, y=310, size=13, text="hidden states: -u ekd_student"),
        arrow("M565,265 L565,292", dashed=True),
        TEXT.format(x=590, y=310, size=13, text="dropped, or kept at test"),
    ]
    tip = (
        '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#333"/></marker></defs>'
    )
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {W} {H}" width="{W}" height="{H}" '
        f'font-family="Helvetica, Arial, sans-serif">\n'
        f'<rect width="{W}" height="{H}" fill="white"/>\n{tip}\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    Path(__file__).with_name("method.svg").write_text(figure(), encoding="utf-8")
