// Run Python compiled to WebAssembly like `python`: node pyodide.mjs FOLDER (-c CODE | -m MODULE | FILE) ARGUMENTS
// FOLDER holds node_modules/pyodide. The working folder and the folder of temporary files are visible.
import { createRequire } from "module";
import { tmpdir } from "os";

const [folder, ...argv] = process.argv.slice(2);
const { loadPyodide } = createRequire(folder + "/")("pyodide");
const { PYTHONPATH = "", PYTHONHASHSEED = "random" } = process.env;
const env = { PYTHONPATH, PYTHONHASHSEED, PYTHONDONTWRITEBYTECODE: "1", HOME: "/home/pyodide" };
const python = await loadPyodide({ env });
const shown = [tmpdir(), process.cwd()].filter((path, i, all) => i == 0 || !path.startsWith(all[0] + "/"));
for (const path of shown) python.mountNodeFS(path, path);
python.globals.set("argv", python.toPy([process.cwd(), ...argv]));
const status = python.runPython(`
import os, runpy, sys, traceback
folder, kind, *rest = argv
os.chdir(folder)
sys.path.insert(0, folder)
sys.path_importer_cache.clear()  # PYTHONPATH was looked up before its folders were there
status = 0
try:
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [kind, *rest]
        runpy.run_path(kind, run_name="__main__")
except SystemExit as error:
    status = error.code or 0
except BaseException:
    traceback.print_exc()
    status = 1
status
`);
process.exit(status);
