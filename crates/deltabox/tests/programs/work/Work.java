import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.nio.charset.StandardCharsets;
import java.security.MessageDigest;
import java.util.Arrays;
import java.util.HashMap;
import java.util.Map;
import java.util.concurrent.ArrayBlockingQueue;
import java.util.concurrent.BlockingQueue;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.Executors;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicLong;

/** Threads that talk through queues, timers, hot code that is compiled, and garbage; spoken to line by line. */
public class Work {
    static final Map<String, String> state = new ConcurrentHashMap<>(Map.of("token", "0"));
    static volatile String failure;
    static final AtomicLong ticks = new AtomicLong(), messages = new AtomicLong(), garbage = new AtomicLong();

    interface Step {
        void run() throws Exception;
    }

    static void forever(Step step) {
        Thread thread = new Thread(() -> {
            try {
                while (true) {
                    step.run();
                }
            } catch (Throwable e) {
                failure = e.toString();
            }
        });
        thread.setDaemon(true);
        thread.start();
    }

    static void check(boolean condition, String what) {
        if (!condition) {
            throw new AssertionError(what);
        }
    }

    /** A ring of threads that pass a number on, each adding one. */
    static void ring(int n) {
        BlockingQueue<Integer> first = new ArrayBlockingQueue<>(1);
        BlockingQueue<Integer> in = first;
        for (int i = 0; i < n; i++) {
            BlockingQueue<Integer> from = in, to = new ArrayBlockingQueue<>(1 + i % 3);
            forever(() -> to.put(from.take() + 1));
            in = to;
        }
        BlockingQueue<Integer> last = in;
        forever(() -> {
            int number = (int) messages.get();
            first.put(number);
            Integer got = last.poll(1, TimeUnit.HOURS);
            check(got != null && got == number + n, got + " came around");
            messages.incrementAndGet();
        });
    }

    static byte[] digest(byte[] block) throws Exception {
        return MessageDigest.getInstance("SHA-256").digest(block);
    }

    static void collect() {
        Map<Integer, byte[]> kept = new HashMap<>(), sums = new HashMap<>();
        forever(() -> {
            int i = (int) garbage.get();
            byte[] block = new byte[10000];
            for (int j = 0; j < block.length; j++) {
                block[j] = (byte) (i * j);
            }
            kept.put(i % 300, block);
            sums.put(i % 300, digest(block));
            int other = i * 7 % 300;
            if (kept.containsKey(other)) {
                check(Arrays.equals(digest(kept.get(other)), sums.get(other)), "block " + other);
            }
            garbage.incrementAndGet();
        });
    }

    static String answer(String line) throws Exception {
        String[] words = line.split(" ");
        switch (words[0]) {
            case "set" -> state.put("token", words[1]);
            case "go" -> {
                for (AtomicLong counter : new AtomicLong[] {ticks, messages, garbage}) {
                    long before = counter.get();
                    while (counter.get() < before + 3 && failure == null) {
                        Thread.sleep(1);
                    }
                }
            }
            default -> { }
        }
        if (failure != null) {
            return "BAD " + failure;
        }
        return words[0].equals("get") ? state.get("token") : "done";
    }

    public static void main(String[] args) throws Exception {
        ring(20);
        collect();
        Executors.newScheduledThreadPool(2).scheduleAtFixedRate(ticks::incrementAndGet, 0, 3, TimeUnit.MILLISECONDS);
        System.out.println("ready");
        BufferedReader lines = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
        for (String line; (line = lines.readLine()) != null; ) {
            System.out.println(answer(line));
        }
        System.exit(0);
    }
}
