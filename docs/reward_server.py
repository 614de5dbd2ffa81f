"""
A reward server: the whole protocol, with nothing but Python's own library. The trainer asks it as

    python docs/reward_server.py 8000
    python train_teacher.py ... --reward="[dict(reward='http://127.0.0.1:8000')]"

Put your model into `score`. It may need an environment of its own, on this machine or another one.
"""
import base64, json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def score(prompt, png, row):
    """One number for one picture, more is better: here the kilobytes of its PNG, or minus those if
    the prompt asks for something plain. PIL.Image.open(io.BytesIO(png)) is the picture."""
    kilobytes = len(png) / 1000
    return -kilobytes if 'plain' in prompt.lower() else kilobytes


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        try:
            asked = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
            pngs = [base64.b64decode(text) for text in asked['images']]
            samples = zip(asked['prompts'], pngs, asked['rows'], strict=True)
            self.reply(200, {'rewards': [score(*sample) for sample in samples]})
        except Exception as e:                     # the trainer shows this text, then stops
            self.reply(500, {'error': f'{type(e).__name__}: {e}'})

    def reply(self, code, answer):
        body = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == '__main__':
    # 127.0.0.1 is this machine only: nobody has to log in, so listen wider only where you trust all
    ThreadingHTTPServer(('127.0.0.1', int(sys.argv[1])), Handler).serve_forever()
