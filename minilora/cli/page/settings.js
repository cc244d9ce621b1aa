// The controls, and the address of the page, which holds what they are set to. Knows no part.

// Each is the id of a control and its name in the address.
const FIELDS = [
  "model",
  "r",
  "alpha",
  "dtype",
  "batch",
  "length",
  "matrix",
  "keep",
  "train-r",
  "train-k",
  "train-alpha",
  "train-method",
  "train-lr",
  "train-seed",
];
// What the slider stops at: an arrow key goes to the next rank that makes a difference.
const RANKS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256];

function byId(id) {
  return document.getElementById(id);
}

// Is what a control holds one of its options, or a number that it takes?
function isValid(control) {
  const whole = control.type !== "number" || control.step === "any" || /^\d+$/.test(control.value);
  return control.value !== "" && whole && control.checkValidity();
}

// What all controls are set to; or null if one has no valid value. That one is named in the place for
// it, which follows its form.
function readSettings() {
  const settings = {};
  let isWhole = true;
  for (const form of document.querySelectorAll("form.controls")) {
    form.nextElementSibling.hidden = true;
  }
  for (const id of FIELDS) {
    const control = byId(id);
    const wrong = !isValid(control);
    control.setAttribute("aria-invalid", String(wrong));
    if (wrong) {
      const name = document.querySelector(`label[for="${id}"]`).textContent;
      const place = control.form.nextElementSibling;
      place.textContent = `${name} must be ${rangeText(control)}.`;
      place.hidden = false;
      isWhole = false;
    }
    const number = ["number", "range"].includes(control.type) || id === "train-lr";
    settings[id] = number ? Number(control.value) : control.value;
  }
  const chosen = [...document.querySelectorAll("#targets input:checked")];
  settings.targets = chosen.map(({ value }) => value);
  return isWhole ? settings : null;
}

function rangeText({ min, max, step }) {
  const kind = step === "any" ? "a number" : "a whole number";
  return max === "" ? `${kind} of at least ${min}` : `${kind} from ${min} to ${max}`;
}

// Set the controls as an address says, "#model=gpt2&r=8&targets=q_proj,v_proj". `showModel()` makes
// the choices that the model has. Returns what the address says in vain, as texts.
function followAddress(hash, showModel) {
  const words = new URLSearchParams(hash.replace(/^#/, ""));
  const ignored = [];
  const set = (id) => {
    const control = byId(id);
    const before = control.value;
    const value = words.get(id);
    control.value = value;
    // A slider or a list turns what it does not know into something else.
    if (control.value !== value || !isValid(control)) {
      control.value = before;
      ignored.push(`${id}=${value}`);
    }
  };
  if (words.has("model")) {
    set("model");
  }
  showModel();
  for (const [id, value] of words) {
    if (id === "targets") {
      ignored.push(...chooseTargets(value.split(",")).map((name) => `targets=${name}`));
    } else if (FIELDS.includes(id) && id !== "model") {
      set(id);
    } else if (!["model", "steps"].includes(id)) {
      ignored.push(value === "" ? id : `${id}=${value}`);
    }
  }
  return ignored;
}

// Check the boxes of these targets, and no others. Returns the names that have no box.
function chooseTargets(names) {
  const boxes = [...document.querySelectorAll("#targets input")];
  for (const box of boxes) {
    box.checked = names.includes(box.value);
  }
  return names.filter((name) => name !== "" && !boxes.some((box) => box.value === name));
}

// The address that says the settings, and how many steps have been trained.
function addressOf(settings, steps) {
  const words = FIELDS.map((id) => `${id}=${settings[id]}`);
  words.push(`targets=${settings.targets.join(",")}`);
  if (steps > 0) {
    words.push(`steps=${steps}`);
  }
  return `#${words.join("&")}`;
}
