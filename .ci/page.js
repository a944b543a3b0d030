// What the tests look at the page with: it runs in each page before its own script, as `look`.
'use strict';
window.look = {
  all: (selector) => [...document.querySelectorAll(selector)],
  texts: (selector) => look.all(selector).map((el) => el.textContent).join(),
  clipboard: () => navigator.clipboard.readText(),

  seen: (selector) => look.all(selector).filter((part) => {
    const box = part.getBoundingClientRect();
    return box.width && box.height && getComputedStyle(part).visibility === 'visible';
  }),

  // One question each: a question of a test for every element takes seconds.
  text: (testid) => look.seen(`[data-testid=${testid}]`)[0]?.innerText ?? '',

  rows: () => look.seen('[data-testid=row]')
    .sort((one, other) => one.ariaRowIndex - other.ariaRowIndex)
    .map((el) => ({
      id: el.dataset.eventId, status: el.dataset.status, y: el.getBoundingClientRect().y,
      tool: el.querySelector('.c-tool').innerText, session: el.querySelector('.c-session').innerText,
      text: el.innerText.replace(/\s+/g, ' ') + ' ',
    })),

  rail: () => look.all('[data-testid=session]').map((el) => [el.dataset.sessionId, el.dataset.state]),

  // The counters in the top bar that are not 0; -1 where one says "?".
  counts: () => Object.fromEntries(look.all('.counter')
    .map((el) => [el.dataset.testid.slice(8), Number(el.querySelector('b').textContent.replace('?', '-1'))])
    .filter(([, number]) => number)),

  // True if the last lines of the last text in the drawer are seen, and have these words.
  ends: (words) => {
    const block = look.all('.drawerbody .block').at(-1);
    const { top, bottom } = block?.getBoundingClientRect() ?? {};
    return top < 0 && bottom > 200 && bottom <= innerHeight && block.innerText.trimEnd().endsWith(words);
  },

  fits: () => [document.documentElement, document.body, ...look.all(
    '.topbar, .banner, .panes, .rail, .tree, .tablepane, .grid, .panehead, .drawer, .drawerbody',
  )].every((part) => part.clientWidth === 0 || part.scrollWidth <= part.clientWidth),

  widths: () => ['.rail', '.drawer'].map((part) => Math.round(document.querySelector(part).offsetWidth)).join(' '),

  // The middle of a call's bar in the page and its colour there; with `at`, in ms, that moment in its lane.
  bar: (target, at) => {
    const { timeline, store } = contextuate;
    const row = store.rows.find((it) => it.target === target);
    const index = timeline.shown.findIndex((lane) => lane.sid === row.sid && lane.agent === row.agent);
    const to = timeline.live ? Date.now() + timeline.span * 0.02 : timeline.to;
    const place = (ms) => timeline.left + (ms - to + timeline.span) / timeline.span * (timeline.width - timeline.left);
    const end = row.outcome ? row.time + row.duration : Date.now();
    const middle = Math.max(place(row.time) + 1, Math.min(place((row.time + end) / 2), place(row.time) + 30));
    const x = at === null ? middle : place(at);
    const y = 24 + 2 + index * 20 + 4 - timeline.top;  // above the words in a bar
    const canvas = document.querySelector('#timeline-canvas');
    const box = canvas.getBoundingClientRect();
    const scale = canvas.width / box.width;
    const pen = Object.assign(document.createElement('canvas'), { width: 1, height: 1 })
      .getContext('2d', { willReadFrequently: true });
    pen.drawImage(canvas, Math.round(x * scale), Math.round(y * scale), 1, 1, 0, 0, 1, 1);
    const hex = [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3).map((part) => part.toString(16).padStart(2, '0')).join('');
    const names = ['bar', 'red', 'amber'].filter((name) =>
      getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim() === '#' + hex);
    return { x: box.x + x, y: box.y + y, colour: names.join() };
  },

  // The lowest contrast of a text in the last block of the drawer with what is behind it.
  contrast: () => {
    const pen = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
    const light = (...colours) => {
      for (const colour of colours) { pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1); }
      const [r, g, b] = [...pen.getImageData(0, 0, 1, 1).data].map((part) => part / 255)
        .map((part) => (part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const block = look.all('.drawer .block').at(-1);
    return Math.min(...[...block.querySelectorAll('span')].map((el) => {
      const style = getComputedStyle(el);
      const [a, b] = [light(getComputedStyle(block).backgroundColor, style.backgroundColor), light(style.color)];
      return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    }));
  },

  // Changes some fields of the monitor's status, now and whenever the monitor sends it.
  hear: (fields) => {
    const { store } = contextuate;
    const hear = (store.hear ??= store.apply.bind(store));
    store.differently = { ...store.differently, ...fields };
    store.apply = (message) => hear(message.type === 'status' ? { ...message, ...store.differently } : message);
    store.apply({ ...store.status, type: 'status' });
  },

  // Notes in `alerts` what a page says; it seems to be in the background.
  noteAlerts: () => {
    window.alerts = [];
    window.Notification = class extends Notification {
      static permission = 'granted';  // a headless browser may deny it whatever is granted
      constructor(title, options) { super(title, options); alerts.push([title, options.body]); }
    };
    document.hasFocus = () => false;
    const make = AudioContext.prototype.createOscillator;
    AudioContext.prototype.createOscillator = function () { alerts.push('tone'); return make.call(this); };
  },

  // Notes in `said` every other title and announcement than those of a page on which nothing is to be done.
  noteTitles: () => {
    window.said = [];
    const live = document.getElementById('announce');
    const note = () => {
      const now = `${document.title}/${live.textContent}`;
      if (now !== 'Contextuate Monitor/') said.push(now);
    };
    for (const it of [document.querySelector('title'), live])
      new MutationObserver(note).observe(it, { childList: true, characterData: true, subtree: true });
  },

  // Notes in `strange` which elements and attributes come that the page has no use for, and in `violations` of its policy.
  noteStrange: () => {
    window.violations = [];
    document.addEventListener('securitypolicyviolation', (event) => violations.push(event.violatedDirective));
    window.strange = new Set();
    const known = new Set(`HTML HEAD BODY META TITLE LINK STYLE SCRIPT HEADER MAIN ASIDE SECTION DIV SPAN LABEL
      FORM INPUT BUTTON I B H1 H2 H3 P OL UL LI CODE SMALL DL DT DD svg path CANVAS DIALOG SELECT
      OPTION KBD HR PROGRESS NAV TABLE THEAD TBODY TR TH TD H4 BLOCKQUOTE STRONG EM S`.split(/\s+/));
    const check = (node) => {
      for (const el of node.nodeType === 1 ? [node, ...node.querySelectorAll('*')] : []) {
        if (!known.has(el.tagName)) strange.add(el.tagName);
        for (const { name } of el.attributes)
          if (/^(on|href|src|action|formaction)/i.test(name) && el.tagName !== 'LINK') strange.add(name);
      }
    };
    const seen = new MutationObserver((changes) => changes.forEach((change) => change.addedNodes.forEach(check)));
    seen.observe(document, { childList: true, subtree: true });
  },

  // What the benchmarks do and measure: the times of frames and of long tasks, in ms.
  frames: (ms) => new Promise((done) => {
    const frames = [], long = [];
    const observer = new PerformanceObserver((list) => {
      for (const task of list.getEntries()) long.push(task.duration);
    });
    observer.observe({ type: 'longtask' });
    let last = 0;
    const end = performance.now() + ms;
    requestAnimationFrame(function next(now) {
      if (last) frames.push(now - last);
      last = now;
      if (now < end) requestAnimationFrame(next);
      else setTimeout(() => { observer.disconnect(); done({ frames, long }); }, 100);
    });
  }),

  // Types into the filter, a letter in 120 ms, and begins again. Notes in `keys` for each the ms of the longest work
  // that followed: its event, or a frame from its first callback to what comes after its paint.
  type: (ms) => {
    const [words, field] = ['step-2345 status:failed', document.getElementById('filter')];
    const [{ port1, port2 }, end] = [new MessageChannel(), performance.now() + ms];
    window.keys = [];
    const worked = (begin) => keys.push(Math.max(keys.pop(), performance.now() - begin));
    const timer = setInterval(() => {
      const begin = performance.now();
      if (begin > end) { clearInterval(timer); return; }
      field.value = words.slice(0, (field.value.length + 1) % (words.length + 1));
      field.dispatchEvent(new InputEvent('input', { bubbles: true }));
      keys.push(performance.now() - begin);
    }, 120);
    requestAnimationFrame(function next() {
      const begin = performance.now();
      port1.onmessage = () => { if (keys.length) worked(begin); };
      port2.postMessage(0);
      if (begin < end) requestAnimationFrame(next);
    });
  },

  scrollAndZoom: (ms) => {
    const grid = document.querySelector('[data-testid=table]');
    const canvas = document.querySelector('#timeline-canvas');
    const box = canvas.getBoundingClientRect();
    let step = 0;
    const timer = setInterval(() => {
      step += 1;
      grid.scrollTop = grid.scrollHeight * Math.abs(Math.sin(step / 40));
      const deltaY = step % 80 < 40 ? 60 : -60, clientX = box.x + box.width * 0.6, clientY = box.y + 60;
      canvas.dispatchEvent(new WheelEvent('wheel', { deltaY, clientX, clientY, cancelable: true }));
    }, 16);
    setTimeout(() => clearInterval(timer), ms);
  },

  // The times until the newest turn of a conversation of a hundred is there, and until all are.
  openConversation: async () => {
    const start = performance.now();
    document.querySelector('[data-mode=conversation]').click();
    let newest = 0;
    for (;;) {
      await new Promise(requestAnimationFrame);
      const whole = look.all('.turn').map((turn) => turn.textContent.includes('20 calls'));
      newest ||= whole.at(-1) ? performance.now() - start : 0;
      if (whole.length === 100 && whole.every(Boolean)) return [newest, performance.now() - start];
    }
  },

  // Notes in `waits` when each session that waits was first seen.
  noteWaits: () => {
    window.waits = {};
    new MutationObserver(() => {
      for (const row of look.all('[data-testid=session][data-state=waiting]'))
        waits[row.dataset.sessionId] ??= Date.now();
    }).observe(document, { subtree: true, childList: true, attributes: true, attributeFilter: ['data-state'] });
  },
};
