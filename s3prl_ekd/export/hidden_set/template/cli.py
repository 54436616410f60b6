"""Run the model on audio files, or on noise to test that it works.

example:
  python cli.py
  python cli.py speech.wav other.flac
  python cli.py speech.wav --save features.pt
"""

import argparse
import sys
import wave
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
RATE = 16000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "audio", metavar="AUDIO", nargs="*", help="audio file, 16 kHz mono (default: noise)"
    )
    parser.add_argument(
        "--ckpt", default=str(HERE / "model.pt"), help="default: model.pt in the folder of cli.py"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--save", metavar="FILE.pt", help="write the hidden states to a file")
    args = parser.parse_args()

    sys.path.insert(0, str(HERE))
    from expert import UpstreamExpert

    if args.audio:
        waves = [read(path) for path in args.audio]
    else:
        waves = [torch.rand(int(seconds * RATE)) for seconds in (2, 1.8, 3.7)]
    model = UpstreamExpert(args.ckpt).to(args.device).eval()
    with torch.no_grad():
        states = model([wave.to(args.device) for wave in waves])["hidden_states"]

    rate = model.get_downsample_rates("hidden_states")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters, {rate} samples per frame")
    print(f"{len(waves)} waveforms of {[len(wave) for wave in waves]} samples")
    for i, state in enumerate(states):
        mean, deviation = state.mean().item(), state.std().item()
        print(f"{i:3d}  {list(state.shape)}  mean {mean:+.4f}  std {deviation:.4f}")
    if args.save:
        torch.save([state.cpu() for state in states], args.save)
        print(f"wrote {args.save}")


def read(path: str) -> torch.Tensor:
    """Read a waveform [sample]. Formats other than WAV need the package soundfile."""
    if path.lower().endswith(".wav"):
        with wave.open(path, "rb") as file:
            if file.getsampwidth() != 2:
                sys.exit(f"{path}: expected 16-bit WAV, got {8 * file.getsampwidth()}-bit")
            check(path, file.getframerate(), file.getnchannels())
            data = bytearray(file.readframes(file.getnframes()))
        return torch.frombuffer(data, dtype=torch.int16).float() / 32768
    import soundfile

    data, rate = soundfile.read(path, dtype="float32", always_2d=True)
    check(path, rate, data.shape[1])
    return torch.from_numpy(data[:, 0].copy())


def check(path: str, rate: int, channels: int) -> None:
    """Exit unless the audio is 16 kHz mono."""
    if (rate, channels) != (RATE, 1):
        sys.exit(f"{path}: expected 16000 Hz and 1 channel, got {rate} Hz and {channels} channels")


if __name__ == "__main__":
    main()
