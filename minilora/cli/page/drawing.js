// Pictures as SVG: heat maps, curves and bars. Colours come from the style sheet, by class, so that
// they follow the theme. Knows numbers and texts, and not what they mean.

const SVG = "http://www.w3.org/2000/svg";

// An element, of HTML or of SVG: its attributes, and what is in it.
function element(name, attributes = {}, ...inside) {
  const svg = ["svg", "g", "rect", "path", "line", "circle", "text"].includes(name);
  const made = svg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    made.setAttribute(key, value);
  }
  made.append(...inside);
  return made;
}

// A table's body: a row of cells for each list, whose first cell is the row's heading. `marks` has
// the class of each row, or nothing.
function fillTable(table, rows, marks = []) {
  const lines = rows.map(([heading, ...cells], i) => {
    const line = element("tr", {}, element("th", { scope: "row" }, heading));
    line.append(...cells.map((cell) => element("td", {}, cell)));
    if (marks[i]) {
      line.className = marks[i];
    }
    return line;
  });
  table.tBodies[0].replaceChildren(...lines);
}

// A matrix as squares: the larger an entry beside `largest`, the fuller its colour; one colour
// above zero, another below.
function drawMap(svg, M, largest) {
  const columns = M[0].length;
  if (svg.childElementCount !== M.length * columns) {
    svg.setAttribute("viewBox", `0 0 ${columns} ${M.length}`);
    const squares = M.flatMap((row, i) =>
      row.map((_, j) => element("rect", { x: j, y: i, width: 1, height: 1 })),
    );
    svg.replaceChildren(...squares);
  }
  M.flat().forEach((value, i) => {
    const fullness = largest > 0 ? Math.min(1, Math.abs(value) / largest) : 0;
    svg.children[i].setAttribute("class", value < 0 ? "below" : "above");
    svg.children[i].setAttribute("fill-opacity", fullness.toFixed(3));
  });
}

// A picture with two axes, as wide as its place on the page, so that letters keep their size.
//
// x and y: {from, to, log, label, ticks: [[value, text], ...]}. Returns what draws into it: `at`
// gives the place of a point, `add` an element, `path` a line through points.
function axes(svg, x, y) {
  const width = svg.clientWidth || 640;
  const height = svg.clientHeight || 272;
  const box = { left: 58, right: width - 20, top: 26, bottom: height - 46 };
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren();
  const add = (name, attributes, ...inside) => svg.append(element(name, attributes, ...inside));
  const share = ({ from, to, log }, value) => {
    const scale = log ? Math.log : (number) => number;
    return (scale(value) - scale(from)) / (scale(to) - scale(from));
  };
  const at = (px, py) => [
    box.left + share(x, px) * (box.right - box.left),
    box.bottom - share(y, py) * (box.bottom - box.top),
  ];
  for (const [value, text] of y.ticks) {
    const [, level] = at(x.from, value);
    add("path", { class: "grid", d: `M${box.left} ${level}H${box.right}` });
    add("text", { class: "quiet", x: box.left - 8, y: level + 4, "text-anchor": "end" }, text);
  }
  for (const [value, text] of x.ticks) {
    const [place] = at(value, y.from);
    add("path", { class: "axis", d: `M${place} ${box.bottom}v5` });
    add("text", { class: "quiet", x: place, y: box.bottom + 20, "text-anchor": "middle" }, text);
  }
  add("path", { class: "axis", d: `M${box.left} ${box.bottom}H${box.right}` });
  const middle = (box.left + box.right) / 2;
  add("text", { x: middle, y: height - 6, "text-anchor": "middle" }, x.label);
  add("text", { x: 4, y: 14 }, y.label);
  const path = (points, name) => {
    const places = points.map(([px, py]) =>
      at(px, py)
        .map((place) => place.toFixed(1))
        .join(" "),
    );
    add("path", { class: name, d: `M${places.join("L")}` });
  };
  return { at, add, path, box };
}

// Powers of two from 1 to `last`, as ticks, no more than fit beside one another.
function doublingTicks(last, most) {
  const powers = [];
  for (let value = 1; value <= last; value *= 2) {
    powers.push(value);
  }
  const stride = Math.ceil(powers.length / most);
  return powers.filter((_, i) => i % stride === 0).map((value) => [value, String(value)]);
}

// Ticks of a logarithmic axis of shares, from one power of ten to another: the powers, as many as
// are read with ease, and where there are few of them what lies between.
function shareTicks(from, to) {
  const powers = [];
  for (let power = Math.round(Math.log10(from)); power <= Math.round(Math.log10(to)); power += 1) {
    powers.push(power);
  }
  const stride = Math.ceil(powers.length / 6);
  const between = powers.length <= 3 ? [1, 2, 5] : [1];
  const ticks = powers
    .filter((_, i) => i % stride === 0)
    .flatMap((power) => between.map((factor) => factor * 10 ** power));
  return ticks.filter((share) => share <= to * 1.001).map((share) => [share, shareText(share)]);
}

function shareText(share) {
  return share >= 1e-4 && share <= 1e3
    ? percent(share)
    : `1e${Math.round(Math.log10(share)) + 2} %`;
}

// Bars of several parts, all to one scale, each under its title and its sum.
// bars: [{title, text, parts: [number, ...]}]; the whole picture is said in words elsewhere.
function drawBars(place, bars) {
  const longest = Math.max(...bars.map(({ parts }) => parts.reduce((sum, part) => sum + part, 0)));
  const drawn = bars.map(({ title, text, parts }) => {
    const bar = element("svg", {
      class: "bar",
      viewBox: "0 0 1000 10",
      preserveAspectRatio: "none",
      "aria-hidden": "true",
    });
    let from = 0;
    parts.forEach((part, i) => {
      const width = (1000 * part) / longest;
      bar.append(element("rect", { class: `part-${i + 1}`, x: from, y: 0, width, height: 10 }));
      from += width;
    });
    const head = element("span", { class: "bar-title" }, element("span", {}, title));
    head.append(element("b", {}, text));
    return element("div", {}, head, bar);
  });
  place.replaceChildren(...drawn);
}
