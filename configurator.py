"""
A script's settings are its flat lower-case names. A word without dashes is a Python file that
overrides them, --key=value overrides one, the later wins. A typo or a wrong type is an error.
python train_opd.py config/some_run.py --steps=100 --lr 1e-4 --compile
python train_opd.py --help
"""
import ast, copy, difflib, pathlib, sys, traceback, types, typing


class BadInput(Exception):
    """Something that the person who runs the script can mend; shown without a traceback."""


def need(good, message):
    if not good:
        raise BadInput(message)


def collect(module):
    """(defaults, types, files) by name of the settings so far; an annotation widens a type."""
    notes, file = getattr(module, '__annotations__', {}), getattr(module, '__file__', None)
    defaults = {k: v for k, v in vars(module).items() if k == k.lower() and k[0] != '_'
                and not isinstance(v, types.ModuleType) and not callable(v)}
    kinds = {k: notes.get(k, object if v is None else type(v)) for k, v in defaults.items()}
    return defaults, kinds, dict.fromkeys(defaults, file)


def _known(key, known, where):
    near = difflib.get_close_matches(key, known, 1)
    mend = f'did you mean {near[0]}?' if near else 'see --help'
    need(key in known, f'{where}: unknown setting {key}, {mend}')


def _odd(x):
    """What is no word, no number that one can work with (inf, 1e30), no list or dict of such."""
    inside = [*x, *x.values()] if type(x) is dict else x if type(x) in (list, tuple) else ()
    good = abs(x) < 2 ** 63 if type(x) in (int, float) else \
        x is None or type(x) in (bool, str, list, tuple, dict)
    return [x] * (not good) + [odd for y in inside for odd in _odd(y)]


def _cast(key, value, kind, where, text=None):
    """A value of the setting's types, else `text` (isinstance would take True for an int)."""
    kinds, alike = typing.get_args(kind) or (kind,), {int: float, list: tuple, tuple: list}
    fits = [t for t in (type(value), alike.get(type(value))) if t in kinds or object in kinds]
    if not fits:
        wanted = kind.__name__ if isinstance(kind, type) else kind
        need(text is not None and str in kinds, f'{where}: {key} should be {wanted}, not '
             f'{type(value).__name__} {value!r:.99}')
        return text
    for odd in _odd(value):
        raise BadInput(f'{where}: {key} cannot hold the {type(odd).__name__} {str(odd):.40}')
    return value if fits[0] is type(value) else fits[0](value)


def _execute(path, values, kinds):
    """Runs a config file on the current values and takes over what it leaves. -> what it set."""
    left = dict(values)
    try:
        tree = ast.parse(pathlib.Path(path).read_bytes(), path)
        exec(compile(tree, path, 'exec'), left)
    except (Exception, SystemExit) as e:
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == path]
        line = lines[-1] if lines else getattr(e, 'lineno', '?')  # a syntax error carries its own
        raise BadInput(f'{path}, line {line}: {type(e).__name__}: {e}') from e
    for key in [k for k in left if k[0] != '_' and not isinstance(left[k], types.ModuleType)]:
        _known(key, values, path)
        values[key] = _cast(key, left[key], kinds[key], path)
    return {getattr(n, 'id', '') for n in ast.walk(tree) if type(getattr(n, 'ctx', 0)) is ast.Store}


class _Dicts(ast.NodeTransformer):
    """dict(a=1), as config files write it, is {'a': 1} on the command line too."""
    def visit_Call(self, node):
        self.generic_visit(node)
        words = {k.arg: k.value for k in node.keywords}
        if ast.unparse(node.func) != 'dict' or node.args or None in words:
            return node
        return ast.Dict([ast.Constant(k) for k in words], [*words.values()])


def configure(settings, argv, given=frozenset()):
    """What collect returned and the command line's words -> SimpleNamespace of all settings. A set
    `given` gets the names of those that somebody set, if only to their defaults."""
    values, kinds, words = copy.deepcopy(settings[0]), settings[1], list(argv)
    if '--help' in words:
        from support.manual import show
        sys.exit(show(*settings))
    while words:
        word = words.pop(0)
        if not word.startswith('--'):
            bare = word.lstrip('-')
            mend = f', did you mean --{bare}?' * (bare.split('=')[0] in values or '=' in word)
            need(pathlib.Path(word).is_file(), f'no such config file: {word!r}{mend}')
            given |= _execute(word, values, kinds)
            continue
        key, equals, text = word[2:].partition('=')
        _known(key, values, word)
        if not equals:  # --compile alone is True, in --compile config.py too
            after = words[0] if words else '--'
            alone = after[:2] == '--' or kinds[key] is bool and after not in ('True', 'False')
            need(not alone or bool in (kinds[key], *typing.get_args(kinds[key])), f'{word} needs '
                 f'a value: {word}=...')
            text = 'True' if alone else words.pop(0)
        try:
            value = ast.literal_eval(_Dicts().visit(ast.parse(text.strip(), mode='eval')))
        except Exception:  # no Python literal: plain text
            value = text
        values[key] = _cast(key, value, kinds[key], word, text)
        given |= {key}
    return types.SimpleNamespace(**values)


def run(main):
    """Calls main with the command line's words; what one can mend is shown as one line."""
    try:
        return main(sys.argv[1:])
    except (Exception, KeyboardInterrupt) as e:
        from support.ending import end
        end(e)
