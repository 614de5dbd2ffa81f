"""
A script's settings are its flat module-level names. A word without dashes is a Python file that overrides
them, --key=value overrides one, the later wins. A typo or a wrong type is an error, in a file as well.

python train_opd.py config/some_run.py --steps=100 --lr 1e-4 --compile
python train_opd.py --help
"""
import ast, copy, difflib, os, pathlib, sys, traceback, types, typing


class BadInput(Exception):
    """Something that the person who runs the script can mend; shown without a traceback."""


def need(good, message):
    if not good:
        raise BadInput(message)


def collect(module):
    """(defaults, types) of the settings that `module` has so far; an annotation widens what one accepts."""
    notes = getattr(module, '__annotations__', {})
    defaults = {k: v for k, v in vars(module).items()
                if not (k != k.lower() or k.startswith('_') or isinstance(v, types.ModuleType) or callable(v))}
    return defaults, {k: notes.get(k, object if v is None else type(v)) for k, v in defaults.items()}


def _kinds(kind):
    """int | None -> (int, NoneType); int -> (int,)"""
    return typing.get_args(kind) or (kind,)


def _names(kind):
    return ' or '.join({types.NoneType: 'None', object: 'anything'}.get(k, k.__name__) for k in _kinds(kind))


def _known(key, known, where):
    if key not in known:
        near = difflib.get_close_matches(key, known, 1)
        mend = f'did you mean {near[0]}?' if near else 'see --help'
        raise BadInput(f'{where}: unknown setting {key}, {mend}')


def _cast(key, value, kind, where, text=None):
    """A value of a type that the setting accepts; what is no other is plain `text`, where there is one."""
    kinds = _kinds(kind)
    if type(value) in kinds or object in kinds:  # the exact type, because isinstance takes True for an int
        return value
    for given, wanted in (int, float), (list, tuple), (tuple, list):
        if type(value) is given and wanted in kinds:
            return wanted(value)
    given = 'None, which it does not accept' if value is None else f'{type(value).__name__} {value!r}'
    need(text is not None and str in kinds, f'{where}: {key} should be {_names(kind)}, not {given}')
    return text


def _execute(path, values, kinds, given):
    """Runs a config file with the current values as its names, and takes over what it leaves behind."""
    names = dict(values)
    try:
        tree = ast.parse(pathlib.Path(path).read_bytes(), path)
        exec(compile(tree, path, 'exec'), names)
    except (Exception, SystemExit) as e:
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == path]
        line = lines[-1] if lines else getattr(e, 'lineno', '?')  # a syntax error carries its own
        raise BadInput(f'{path}, line {line}: {type(e).__name__}: {e}') from e
    for key, value in names.items():
        if key[0] != '_' and not isinstance(value, types.ModuleType):
            _known(key, values, path)
            values[key] = _cast(key, value, kinds[key], path)
    given |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


class _Dicts(ast.NodeTransformer):
    """dict(a=1), as config files write it, is {'a': 1} on the command line too."""

    def visit_Call(self, node):
        self.generic_visit(node)
        plain = getattr(node.func, 'id', '') == 'dict' and not node.args and all(k.arg for k in node.keywords)
        pairs = [(ast.Constant(k.arg), k.value) for k in node.keywords]
        return ast.Dict(*map(list, zip(*pairs))) if plain and pairs else node


def configure(settings, argv, given=None):
    """What collect returned and the command line's words -> SimpleNamespace of all settings. The set `given`
    gets the names of those that somebody set, if only to their defaults."""
    defaults, kinds = settings
    given = set() if given is None else given
    values, words = copy.deepcopy(defaults), list(argv)
    if '--help' in words:
        print('\n'.join(f'--{k}={v!r}  ({_names(kinds[k])})' for k, v in defaults.items()))
        sys.exit(0)
    while words:
        word = words.pop(0)
        if not word.startswith('--'):
            bare = word.lstrip('-')
            mend = f', did you mean --{bare}?' if bare.split('=')[0] in values or '=' in word else ''
            need(pathlib.Path(word).is_file(), f'no such config file: {word!r}{mend}')
            _execute(word, values, kinds, given)
            continue
        key, equals, text = word[2:].partition('=')
        _known(key, values, word)
        if not equals:  # --compile alone is True; --compile config.py: the next word is not its value
            alone = not words or words[0].startswith('--') or \
                kinds[key] is bool and words[0] not in ('True', 'False')
            need(not alone or bool in _kinds(kinds[key]), f'{word} needs a value: {word}=...')
            text = 'True' if alone else words.pop(0)
        try:
            value = ast.literal_eval(_Dicts().visit(ast.parse(text.strip(), mode='eval')))
        except Exception:  # no Python literal: plain text
            value = text
        values[key] = _cast(key, value, kinds[key], word, text)
        given.add(key)
    return types.SimpleNamespace(**values)


def run(main):
    """Calls main with the command line's words; what one can mend is shown as one line, no traceback. Of
    several processes one that fails ends at once: others may wait for it, and it must not wait for them."""
    name, alone = pathlib.Path(sys.argv[0]).name, os.environ.get('WORLD_SIZE', '1') == '1'
    try:
        return main(sys.argv[1:])
    except BadInput as e:
        code, said = 2, f'{name}: {e}'
    except KeyboardInterrupt:
        code, said = 130, f'{name}: interrupted'
    except Exception:
        if alone:
            raise
        code, said = 1, traceback.format_exc()
    print(said, file=sys.stderr)
    if not alone:
        sys.stdout.flush(), sys.stderr.flush(), os._exit(code)
    sys.exit(code)
